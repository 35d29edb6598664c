"""One readable training loop, for any module with `forward(batch) -> Output` and any task.

    for each step:  micro-batches -> sums of gradients and counts, over micro-batches and ranks
                    -> divide, clip, guarded step -> moving average
                    then, when due: a row of metrics, a checkpoint, an evaluation, samples

A loss is a sum and a count, so how a batch is split into micro-batches and between ranks changes nothing but rounding.
Numbers are read one step after the device was asked for them. Everything that decides a step's result is in the
checkpoint. All ranks run this loop and take every turn in it together; the first one writes (zoo/train/parallel.py).
"""

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import config as configs
from zoo import recording, registry
from zoo.config import Choice, ConfigError
from zoo.train import checkpoint, graph, optim, parallel
from zoo.train.log import RunLog, Silence
from zoo.train.parallel import Ranks
from zoo.train.profile import Profile, peak_flops, training_flops
from zoo.train.recipe import (
    Recipe,
    check_same,
    find_start,
    make_model,
    make_task,
    pick_device,
    start_backbone,
    what_a_number_carries,
    write_run_files,
)
from zoo.train.run import Reading, Run, autocast
from zoo.train.signals import Signals


@dataclass
class Result:
    """What a finished run leaves: its folder, newest checkpoint, last numbers, and steps left out as non-finite."""

    run: Path
    step: int
    checkpoint: Path
    metrics: dict[str, float]
    skipped: int


class Interrupted(SystemExit):
    """Ctrl-C (code 130) or SIGTERM (143): the run was saved first."""


def train(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    command: str = "",
    profile: bool = False,
) -> Result:
    """Train `recipe` in the folder `run`; with `resume`, go on from its newest whole checkpoint (or begin).

    allow_changes  resume although the recipe or the data differ in more than cadences
    command        what a person types to go on, for the message after an interruption
    profile        write a trace of a few steps, and a table of where their time went, into run/profile
    Raises ResumeError, Diverged, checkpoint.NonFinite, checkpoint.DiskFull, and Interrupted after Ctrl-C or SIGTERM.
    """
    device = pick_device(recipe.train.device)
    ranks = parallel.start_ranks(recipe.train.parallel, device)
    try:
        result = _train(recipe, Path(run), ranks, device, resume, allow_changes, command, profile)
    except Interrupted:
        ranks.close()
        raise
    except BaseException as error:
        ranks.close(error)
        raise
    ranks.close()
    return result


def _train(
    recipe: Recipe,
    run: Path,
    ranks: Ranks,
    device: torch.device,
    resume: bool,
    allow_changes: bool,
    command: str,
    profile: bool,
) -> Result:
    config = recipe.train
    found, notes = ranks.first(lambda: find_start(recipe, run, resume))
    checkpoint.seed_everything(config.seed)
    kept = run / "assets" if found is not None else None  # a tokenizer that was fitted is read back, not fitted again
    task = ranks.in_turn(lambda: make_task(recipe, kept))
    model = make_model(recipe, task)
    facts = what_a_number_carries(recipe, task) | ranks.in_turn(lambda: start_backbone(recipe, model, found))
    notes += check_same(found, recipe, facts, allow_changes)
    if found is None and (given := facts.get("backbone_from")):
        notes.append(f"beginning with the backbone of {given['origin']} ({given['name']})")
    state = Run(recipe, run, task, model, device, ranks, facts, found)
    if found is not None:
        notes.append(f"resuming {run} from {found.name}")
    ranks.first(lambda: write_run_files(recipe, task, run, device, facts))
    go_on = command or f"zoo train {shlex.quote(str(run / 'recipe.yaml'))} --run {shlex.quote(str(run))} --resume"
    peak = peak_flops(device, config.precision)
    writer = RunLog if ranks.rank == 0 else Silence
    log = writer(run, step=state.step, steps=config.steps, peak=peak * ranks.world if peak else None)
    with Signals() as signals, log, state.stream:
        if config.graph and device.type not in recording.DEVICES:
            notes.append(f"train.graph records steps on a GPU; on {device} they run as they are")
        for note in notes:
            log.say(note)
        for orphan in ranks.first(lambda: checkpoint.sweep(run / "checkpoints")):
            log.say(f"removed {orphan.name}, left half-written by a process that was stopped")
        log.say(describe(state))
        result = _loop(state, log, signals, go_on, Profile(run / "profile", ranks.rank, device) if profile else None)
        log.say(f"done: {result.step} steps, {result.checkpoint}{told_best(state)}")
    return result


def _loop(state: Run, log: RunLog, signals: Signals, go_on: str, profile: Profile | None) -> Result:
    config = state.recipe.train
    forward = state.ranks.trainer_of(state.model, config.compile)
    update = _recorded(state, partial(_update, state, forward, signals))
    batches = iter(state.stream)
    pending: Reading | None = None

    if state.due(config.eval_every) and state.evaluated < state.step:  # interrupted between a step and its evaluation
        state.evaluate(log, signals)
        if state.improved is not None:
            state.save()
    while state.step < config.steps and not state.finished:
        reading = _step(state, update, batches)
        state.step += 1
        if profile is not None and (table := profile.step()):
            log.say(f"profile, in {profile.folder}:\n{table}")
        reading.seconds = log.advance(state.step)
        if pending is not None:
            state.read(pending, log)
        pending = reading

        evaluating, sampling = state.due(config.eval_every), state.due(config.sample_every)
        saving = state.due(config.save_every) or state.step == config.steps
        if not (evaluating or sampling or saving or state.stop(signals)):
            continue
        state.read(pending, log)
        pending = None
        stop = state.stop(signals)
        log.pause()
        if evaluating:
            state.evaluate(log, signals)
            stop = state.stop(signals)
            if state.finished:
                log.say(f"step {state.step}: {state.finished}, so the run ends here")
            saving = saving or bool(state.finished) or state.improved is not None
        if sampling and not stop:
            with signals.waiting_for("the samples"):
                state.sample(log)
            stop = state.stop(signals)
        if saving or stop:
            state.save()
            log.flush()
            stop = state.stop(signals)
        if stop:
            log.say(f"stopped by {stop.name} after step {state.step}; saved {state.saved}. To go on:\n  {go_on}")
            raise Interrupted(128 + stop)
        log.go_on()
    if profile is not None:
        profile.close()
    return Result(state.run, state.step, state.saved or state.save(), state.last, int(state.guard.skipped.item()))


def _recorded(state: Run, update: Callable[..., Any]) -> Callable[..., Any]:
    """The same update, as a CUDA graph where train.graph says so. Raises ConfigError on several ranks."""
    if state.recipe.train.graph and state.ranks.world > 1:
        raise ConfigError(
            f"train.graph = true records the step of one process, and this job has {state.ranks.world} ranks: "
            "exchanges between them are not recorded; it takes false here"
        )
    if not state.recipe.train.graph or state.device.type not in recording.DEVICES:
        return update
    return graph.Recorder(update, state.device)


def _step(state: Run, update: Callable[..., Any], batches: Iterator[Any]) -> Reading:
    """One update. All that it takes from the host and that changes from step to step is handed to it here."""
    config, device = state.recipe.train, state.device
    lr = config.optimizer.lr * optim.lr_share(config.schedule, state.step, config.steps)
    share = state.ema.share_of(state.step) if state.ema is not None else 0.0
    position = state.stream.state_dict()
    state.model.train()
    parts: Iterable[Any] = _parts(state, batches)
    names, values, reports = update(list(parts) if isinstance(update, graph.Recorder) else parts, lr, share)
    optim.set_lr(state.optimizer, lr)  # between steps it is a number, also after one that was recorded
    after = None
    if device.type == "cuda":
        values, reports = values.to("cpu", non_blocking=True), reports.to("cpu", non_blocking=True)
        after = torch.cuda.Event()
        after.record()
    return Reading(state.step + 1, position, lr, names, values, reports, after)


def _parts(state: Run, batches: Iterator[Any]) -> Iterator[Any]:
    """The micro-batches of a step, as they are read."""
    for _ in range(state.parts):
        state.ranks.mark(f"step {state.step + 1}, data")
        if (batch := next(batches, None)) is None:
            raise ValueError(f"the training stream of {type(state.task).__name__} ended; it has to be endless")
        state.flops = state.flops or training_flops(state.model, batch) * state.parts * state.ranks.data_world
        yield state.ranks.split(batch)


def _update(
    state: Run, forward: Any, signals: Signals, parts: Iterable[Any], lr: float | Tensor, share: float | Tensor
) -> tuple[list[str], Tensor, Tensor]:
    """Sums of losses, gradients and counts over micro-batches and ranks, then one guarded step at the rate `lr`, of
    which the moving average takes `share`. Returns (names, values, reports) of the step's Reading, on the device."""
    config, device, ranks, guard = state.recipe.train, state.device, state.ranks, state.guard
    fp16 = config.precision == "fp16"
    optim.set_lr(state.optimizer, lr)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    report: list[Tensor] = []
    for part, batch in enumerate(parts):
        batch = batch.to(device)
        ranks.mark(f"step {state.step + 1}, forward and backward")
        with ranks.micro_batch(forward, last=part == state.parts - 1):
            with autocast(config.precision, device):
                output = forward(batch)
            if fp16 and state.step == 0 and part == 0:  # never recorded: a shape's first steps are not
                guard.scale.copy_(ranks.min(optim.FIRST_SCALE / output.count.clamp(min=1)))
            (output.loss_sum * guard.scale if fp16 else output.loss_sum).backward()
        report.append((~torch.isfinite(output.loss_sum.detach())).double())
        for name, (total, count) in {"loss": (output.loss_sum, output.count), **output.metrics}.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total.detach().double(), old[1] + count.detach().double())

    ranks.mark(f"step {state.step + 1}, update")
    received = signals.received if ranks.world > 1 else None  # one alone looks by itself (Run.stop)
    report.append(torch.full((), float(received or 0), dtype=torch.float64, device=device))
    everyone = ranks.gather(torch.stack([t for pair in sums.values() for t in pair] + report))
    reports, flat = everyone[:, 2 * len(sums) :], everyone[:, : 2 * len(sums)].sum(dim=0)
    totals = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(sums)}
    state.take_gradients()
    norm, taken = optim.guarded_step(
        state.optimizer, guard, *totals["loss"], clip=config.optimizer.clip, fp16=fp16, ranks=ranks
    )
    state.drop_gradients()
    if state.ema is not None:
        state.ema.update(state.model, share, taken)

    names = ["taken", "in_a_row", "norm"] + [f"{part}/{name}" for name in totals for part in ("sum", "count")]
    return names, torch.cat([torch.stack([taken.double(), guard.in_a_row.double(), norm.double()]), flat]), reports


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def told_best(state: Run) -> str:
    best = state.best
    return f"; best: {best.rule.rstrip('<> ')} {best.value:.4g} at step {best.step}" if best is not None else ""


def describe(state: Run) -> str:
    model, task, ranks = state.recipe.model, state.recipe.task, state.ranks
    size = sum(p.numel() for p in state.parameters.values())
    context = f", {ranks.config.context} to a row" if ranks.config.context > 1 else ""
    spread = f" x {ranks.world} ({ranks.config.name}{context})" if ranks.world > 1 else ""
    name = model.name + changed_mixer(model) if model else "?"
    return (
        f"{name} ({size:,} parameters) on {task.name if task else '?'}, {state.device}{spread}"
        f", {state.recipe.train.precision}, recipe {configs.fingerprint(state.recipe)}, in {state.run}"
    )


def changed_mixer(model: Choice) -> str:
    """', mixer swa' where the layers are not of the mixers that the model's name stands for."""
    if not hasattr(model.config, "backbone") or model.name not in registry.models:
        return ""
    configured = (model.config, registry.models.get(model.name)())
    names, usual = (dict.fromkeys(layer.name for layer in config.backbone.layers()) for config in configured)
    return f", mixer {' + '.join(names)}" if names != usual else ""
