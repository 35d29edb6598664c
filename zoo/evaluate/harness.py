"""Text runs in lm-evaluation-harness (the optional extra `eval`): its tasks, our models.

    zoo evaluate runs/text-wikitext2 --harness lambada_openai,piqa

Whatever task turns texts into token rows by `prompt` will do. Rows are cut on the left to the task's context, if it has
one; an empty context becomes a line's end, for a model needs something to continue from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data import IGNORED, StridedWindows
from zoo.evaluate.score import Scores, circumstances, origin
from zoo.generation import Sampling
from zoo.model import Batch, Model
from zoo.pipelines import Pipeline, pipeline
from zoo.registry import MissingExtra
from zoo.train import pick_device

START = "\n"
MOST_NEW = 256  # elements drawn for a request that sets no limit


def run_harness(
    run: Path,
    tasks: Sequence[str],
    *,
    device: str | None = None,
    ema: bool = True,
    batch_size: int = 16,
    limit: int | None = None,
) -> Scores:
    """Evaluate a text run on the harness's tasks, zero-shot unless a task says otherwise; appends a row a number to
    <run>/results.jsonl.

    limit  examples of each task; None: all
    Raises MissingExtra without the extra, FileNotFoundError where there is no run.
    """
    try:
        import lm_eval  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise MissingExtra("--harness needs lm-evaluation-harness: pip install 'gatedfwa-zoo[eval]'") from error
    place = pick_device(device)
    pipe = pipeline(run, device=str(place), ema=ema)
    found = lm_eval.simple_evaluate(
        model=as_harness_model(pipe, batch_size), tasks=list(tasks), limit=limit, bootstrap_iters=0
    )
    common = {**origin(run), "batch_size": batch_size, "limit": limit, **circumstances(place)}
    values: dict[str, float] = {}
    rows = []
    for task, numbers in found["results"].items():
        about = {"harness": lm_eval.__version__, "harness_task": task, "shots": found["n-shot"].get(task)}
        about |= {"task_version": found["versions"].get(task)}
        for name, value in numbers.items():
            if isinstance(value, float) and "stderr" not in name:
                label = f"{task}/{name.removesuffix(',none')}"
                values[label] = value
                rows.append({"name": label, "value": value, "kind": "harness", **about, **common})
    with (run / "results.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return Scores(f"{run} at step {common['step']}, lm-evaluation-harness {lm_eval.__version__}", values, {})


def as_harness_model(pipe: Pipeline, batch_size: int) -> Any:
    """A harness `LM` around a pipeline."""
    from lm_eval.api.model import LM  # type: ignore[import-not-found]

    class ZooLM(LM):  # here, for the harness is optional
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return loglikelihoods(pipe, [request.args for request in requests], batch_size)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [whole_text(pipe, request.args[0], batch_size) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [continued(pipe, *request.args) for request in requests]

    return ZooLM()


# ---------------------------------------------------------------------------------------------------------------------


def loglikelihoods(pipe: Pipeline, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[tuple[float, bool]]:
    """(context, continuation) -> (log-probability of the continuation in nats, whether greedy decoding gives it).

    Spaces at the end of a context count to the continuation, as the harness has it: tokenizers like them there."""
    rows = [row_of(pipe, context, continuation) for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # rows of a batch about as long
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    for begin in range(0, len(order), batch_size):
        mine = order[begin : begin + batch_size]
        for i, score in zip(mine, score_rows(pipe.model, [rows[i] for i in mine]), strict=True):
            found[i] = score
    return found


def row_of(pipe: Pipeline, context: str, continuation: str) -> tuple[Tensor, Tensor]:
    """Inputs (n,) and targets (n,), the context's unscored."""
    kept = context.rstrip()
    kept, continuation = kept, context[len(kept) :] + continuation
    kept = kept or START
    whole, begun = tokens_of(pipe, kept + continuation), tokens_of(pipe, kept)
    inputs, targets = whole[:-1], whole[1:].clone()
    targets[: len(begun) - 1] = IGNORED
    most = context_of(pipe) or len(inputs)
    return inputs[-most:], targets[-most:]


@torch.inference_mode()
def score_rows(model: Model, rows: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[float, bool]]:
    """Of each row the sum of its targets' log-probabilities, and whether all are the likeliest."""
    device = next(model.parameters()).device
    inputs = torch.nn.utils.rnn.pad_sequence([x for x, _ in rows], batch_first=True).to(device)
    targets = torch.nn.utils.rnn.pad_sequence([y for _, y in rows], batch_first=True, padding_value=IGNORED).to(device)
    h, _ = model.head.embed(inputs, Batch(None).ctx)
    h, _ = model.backbone(h, Batch(None).ctx)
    scored = targets != IGNORED
    logits = model.head.logits(h[scored], None).float()
    nats = torch.zeros(targets.shape, dtype=torch.float64, device=device)
    nats[scored] = -F.cross_entropy(logits, targets[scored], reduction="none").double()
    missed = torch.zeros_like(scored)
    missed[scored] = logits.argmax(-1) != targets[scored]
    return list(zip(nats.sum(dim=1).tolist(), (~missed.any(dim=1)).tolist(), strict=True))


def whole_text(pipe: Pipeline, text: str, batch_size: int) -> float:
    """The log-probability of all of a text, in rows of the task's context, one after another."""
    tokens = tokens_of(pipe, START + text)
    if len(tokens) < 2:
        return 0.0
    windows = StridedWindows(tokens.numpy(), context_of(pipe) or len(tokens) - 1)
    rows = [windows.item(position) for position in range(len(windows))]
    parts = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]
    return sum(nats for part in parts for nats, _ in score_rows(pipe.model, part))


def continued(pipe: Pipeline, context: str, options: dict[str, Any]) -> str:
    """Greedy, or at the request's temperature, up to the first of its stop strings."""
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
    most = int(options.get("max_gen_toks") or MOST_NEW)
    return pipe.sample(context or START, max_new=most, sampling=Sampling(temperature), seed=0, stop=stops)


def tokens_of(pipe: Pipeline, text: str) -> Tensor:
    return pipe.task.prompt(text).inputs[0]


def context_of(pipe: Pipeline) -> int:
    """The most tokens of a row, 0 for any number."""
    return int(getattr(pipe.task.config, "context", 0))  # type: ignore[attr-defined]
