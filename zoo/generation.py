"""Sampling from a model: chunked prefill of the prompt, then one token a step on a state of fixed shape.

Samplers are pure functions on logits (B, V). Nothing here reads a tensor on the host: a step never waits for the
device, so callers that stream pay for the wait only where they look at the tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from zoo import recording
from zoo.model import Batch, Context, Model
from zoo.state import clone, leaves, map_state


@dataclass(frozen=True)
class Sampling:
    """How the next element is drawn.

    temperature         divides the logits; 0 takes the most likely element
    top_k               keep the k most likely (0: all)
    top_p               keep the smallest set whose probability reaches p (Holtzman et al., arXiv 1904.09751)
    min_p               keep those at least min_p times as likely as the most likely one (arXiv 2407.01082)
    repetition_penalty  divide positive and multiply negative logits of elements that occurred (arXiv 1909.05858)
    guidance            of a conditional model: how far the parameters of the distribution go from those without the
                        condition (0) to those with it (1) and beyond (classifier-free guidance, arXiv 2207.12598)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance: float = 1.0

    def __post_init__(self):
        accepted = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "a number above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "a number above 0; 1 is none"),
            "guidance": (self.guidance >= 0, "0 or more; 1 is none"),
        }
        for name, (fine, takes) in accepted.items():
            if not fine:
                raise ValueError(f"{name} = {getattr(self, name)}; it takes {takes}")


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: (B, V) float logits -> (B, V) with -inf where an element is ruled out


def penalise_repetition(logits: Tensor, occurred: Tensor, penalty: float) -> Tensor:
    """occurred (B, V): nonzero where the element was seen."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(occurred > 0, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    if k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    ordered, places = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    beyond = probabilities.cumsum(dim=-1) - probabilities >= p  # what stands before it already reaches p
    return logits.masked_fill(beyond.scatter(-1, places, beyond), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def sample_logits(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, occurred: Tensor | None = None
) -> Tensor:
    """(B, V) -> (B,) int64: penalty, temperature, top-k, top-p, min-p, then one draw a row."""
    logits = logits.float()
    if occurred is not None and sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, occurred, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    # argmax(p / e) with e ~ Exp(1) is a draw from p; unlike multinomial it never waits for the device.
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------


@overload
def generate(
    model: Model,
    inputs: Any,
    *,
    max_new: int,
    sampling: Sampling = ...,
    stream: Literal[False] = False,
    seed: int | None = None,
    chunk: int = 2048,
    graph: bool = ...,
) -> Tensor: ...
@overload
def generate(
    model: Model,
    inputs: Any,
    *,
    max_new: int,
    sampling: Sampling = ...,
    stream: Literal[True],
    seed: int | None = None,
    chunk: int = 2048,
    graph: bool = ...,
) -> Iterator[Tensor]: ...
def generate(
    model: Model,
    inputs: Any,
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    stream: bool = False,
    seed: int | None = None,
    chunk: int = 2048,
    graph: bool = False,
) -> Tensor | Iterator[Tensor]:
    """Continue `inputs` by `max_new` elements, in the model's own world: tensors in, tensors out.

    inputs  a prompt as the head takes it, batch first, or a Batch: ctx.lengths (B,) for rows padded on the right, and
            condition
    stream  True: an iterator that yields each step's (B, 1, …) as it is drawn; False: all of them, (B, max_new, …)
    seed    of the draws; None takes a fresh one
    chunk   prompt tokens per prefill call: bounds the memory of a long prompt
    graph   on a CUDA device, record a step once and replay it: small batches no longer wait for Python
    Raises ValueError for an empty prompt, wrong lengths, or inputs that the head cannot embed (looked at on the CPU
    always, on a GPU under ZOO_DEBUG=1 only).
    """
    if max_new < 1:
        raise ValueError(f"max_new = {max_new}; it takes 1 or more")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}; it takes 1 or more")
    batch = inputs if isinstance(inputs, Batch) else Batch(inputs)
    _check_prompt(batch, sampling)
    model.head.check(batch.inputs)  # where the caller has them: an index out of range on a GPU ends its context
    device = next(model.parameters()).device
    if graph and device.type not in recording.DEVICES:
        raise ValueError(f"graph = True records a CUDA graph; the model is on {device}, where it takes False")
    steps = _steps(model, batch, max_new, sampling, seed, chunk, graph)
    return steps if stream else torch.cat(list(steps), dim=1)


def _check_prompt(batch: Batch, sampling: Sampling) -> None:
    """What would fail late or silently; before the first step a look at values costs nothing."""
    if sampling.guidance != 1 and batch.condition is None:
        raise ValueError(f"guidance = {sampling.guidance} needs a condition to guide towards; without one it takes 1")
    tokens = batch.inputs.shape[1]
    if tokens < 1:
        raise ValueError("the prompt is empty; a model needs at least one element to continue from")
    if batch.ctx.positions is not None or batch.ctx.cu_seqlens is not None:
        raise ValueError(
            "a prompt takes no ctx.positions and no ctx.cu_seqlens: steps count on from the prompt's length"
        )
    lengths = batch.ctx.lengths
    if lengths is not None and not (int(lengths.min()) >= 1 and int(lengths.max()) <= tokens):
        raise ValueError(f"ctx.lengths = {lengths.tolist()}; with {tokens} tokens a row they take 1 to {tokens}")


@torch.inference_mode()
def _steps(
    model: Model, batch: Batch, max_new: int, sampling: Sampling, seed: int | None, chunk: int, graph: bool
) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    batch = batch.to(device)
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    training = model.training
    model.eval()
    try:
        rows, tokens = batch.inputs.shape[:2]
        guided = sampling.guidance != 1
        cache: Any = model.backbone.init_cache(rows * (2 if guided else 1), tokens + max_new)
        head_state: Any = model.head.init_state(batch.inputs, batch.condition, batch.ctx.lengths)
        h_last, cache, head_state = prefill(model, batch, cache, head_state, chunk, guided)
        drawn, head_state = _draw(model, h_last, head_state, sampling, generator)
        yield drawn

        def step(state: Any) -> Any:
            h, cache, head_state = _advance(model, state["drawn"], Context(), state["cache"], state["head"], guided)
            drawn, head_state = _draw(model, h[:, -1], head_state, sampling, generator)
            return {"drawn": drawn, "cache": cache, "head": head_state}

        state: Any = {"drawn": drawn, "cache": cache, "head": head_state}
        del cache, head_state
        replay: Callable[[], Tensor] | None = None
        if graph and max_new > 1:
            state = clone(state)  # memory that nobody else has, without views of one another: the graph writes there
            replay = _recorded(step, state, generator)
        for _ in range(max_new - 1):
            if replay is not None:
                yield replay()
            else:
                state = step(state)
                yield state["drawn"]
    finally:
        model.train(training)


def prefill(
    model: Model, batch: Batch, cache: Any, head_state: Any, chunk: int, guided: bool = False
) -> tuple[Tensor, Any, Any]:
    """Feed the prompt in chunks; returns the hidden state (B, C) after each row's last token, and the states. Guided:
    the cache and the hidden states have 2 B rows, first those with the condition, then the same without it."""
    rows, tokens = batch.inputs.shape[:2]
    lengths = batch.ctx.lengths
    h_last: Tensor | None = None
    for begin in range(0, tokens, chunk):
        piece = batch.inputs[:, begin : begin + chunk]
        here = None if lengths is None else (lengths - begin).clamp(min=0, max=piece.shape[1])
        h, cache, head_state = _advance(model, piece, replace(batch.ctx, lengths=here), cache, head_state, guided)
        if here is None:
            h_last = h[:, -1]
        else:
            here = here.repeat(len(h) // rows)
            last = h[torch.arange(len(h), device=h.device), (here - 1).clamp(min=0)]
            h_last = last if h_last is None else torch.where((here > 0).unsqueeze(1), last, h_last)
    assert h_last is not None
    return h_last, cache, head_state


def _advance(
    model: Model, inputs: Any, ctx: Context, cache: Any, head_state: Any, guided: bool
) -> tuple[Tensor, Any, Any]:
    """Hidden states of T more elements, and the states after them. What the head remembers is one for both halves of a
    guided batch, but for the condition."""
    if not guided:
        h, head_state = model.head.embed(inputs, ctx, head_state)
        return *model.hidden(h, ctx, cache), head_state
    without, _ = model.head.embed(inputs, ctx, model.head.unconditional(clone(head_state)))
    given, head_state = model.head.embed(inputs, ctx, head_state)
    if ctx.lengths is not None:
        ctx = replace(ctx, lengths=ctx.lengths.repeat(2))
    return *model.hidden(torch.cat((given, without)), ctx, cache), head_state


def _draw(model: Model, h_last: Tensor, head_state: Any, sampling: Sampling, generator: Any) -> tuple[Any, Any]:
    params = _parameters(model, h_last, head_state, sampling.guidance)
    return model.head.sample(params, head_state, sampling, generator)


def _parameters(model: Model, h_last: Tensor, head_state: Any, guidance: float) -> Tensor:
    if guidance == 1:
        return model.head.logits(h_last, head_state)
    given, without = h_last.chunk(2)
    free = model.head.logits(without, model.head.unconditional(clone(head_state))).float()
    return free + guidance * (model.head.logits(given, head_state).float() - free)


def _step_in_place(step: Callable[[Any], Any], state: Any) -> None:
    """One step on the tensors of `state` themselves: what they hold afterwards stands where it stood before.

    A step may exchange entries of the dicts that it is given, so it gets dicts of its own: `state` keeps its tensors.
    """
    after = step(map_state(lambda tensor: tensor, state))
    pairs = [(old, new) for old, new in zip(leaves(state), leaves(after), strict=True) if new is not old]
    for old, new in [(old, new.clone()) for old, new in pairs]:  # one may be a view of what another overwrites
        old.copy_(new)


def _recorded(step: Callable[[Any], Any], state: Any, generator: torch.Generator) -> Callable[[], Tensor]:
    """`step` as a CUDA graph over the memory of `state` {"drawn", "cache", "head"}; each call goes one step on and
    returns what it drew. Steps are of fixed shapes and never look at a value, so all of them are the same graph."""
    before = generator.get_state()
    with torch.cuda.device(generator.device):
        aside, trial = torch.cuda.Stream(), clone(state)
        for _ in range(2):
            recording.on_stream(partial(_step_in_place, step, trial), aside)
        generator.set_state(before)
        _, replay = recording.record(partial(_step_in_place, step, state), aside, generator=generator)

    def drawn() -> Tensor:
        replay()
        return state["drawn"].clone()

    return drawn
