"""Published numbers, measured again from their weights: each comes back within the tolerance that its card states."""

import json
from dataclasses import dataclass

from zoo import config as configs
from zoo import weights
from zoo.evaluate.score import measure_split
from zoo.train import load_published, pick_device
from zoo.train.parallel import Ranks


@dataclass(frozen=True)
class Repeated:
    """name of the number; published and measured values; tolerance, absolute."""

    name: str
    published: float
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.published) <= self.tolerance

    def line(self) -> str:
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"  {self.name}  {self.published:.5g} +- {self.tolerance:.2g}, now {self.measured:.5g}: {verdict}"


def repeat(name: str, *, device: str | None = None, batch_size: int | None = None) -> list[Repeated]:
    """Every number of the card of published weights, by the card's own protocol.

    batch_size  None: the card's; it decides speed, memory and rounding alone
    Raises FileNotFoundError, WeightsError; WeightsError, too, where the data are not the ones that the card names.
    """
    facts = weights.open_card(name).facts
    said = facts["evaluation"]
    place = pick_device(device)
    recipe, task, model = load_published(name, device=place, overrides=configs.dotted(said["overrides"]))
    split, size = said["split"], batch_size or said["batch_size"]
    measured = measure_split(recipe, task, model, split, batch_size=size, device=place, ranks=Ranks())
    evaluated_on = json.loads(json.dumps(measured.facts["evaluated_on"]))  # as read back
    if changed := configs.difference(said["evaluated_on"], evaluated_on, "data"):
        raise weights.WeightsError(f"{name} was evaluated on other data than these:\n  " + "\n  ".join(changed))
    return [
        Repeated(entry["name"], entry["value"], measured.values[entry["name"]], entry["tolerance"])
        for entry in facts["numbers"]
    ]
