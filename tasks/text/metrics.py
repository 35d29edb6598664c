"""Perplexities, bits per byte and last-word accuracy, as sums over tokens: independent of batches and ranks."""

import gzip
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.model import Batch


@dataclass(frozen=True)
class TextSize:
    """What a complete pass over a text scores: `tokens`, which stand for `words` and `bytes` of the original."""

    tokens: int
    words: int
    bytes: int


class Likelihood:
    """loss in nats a token; perplexity a token and a word; bits per byte of the original text that was scored.

    size          of the whole text. Words count each line's end as one, as WikiText's published perplexities do
    byte_lengths  (V,) bytes behind each token id, as its tokenizer has them
    tokens        (N,) the ids that a complete pass scores
    A pass over a part of the text counts its words by its share of the tokens, and its bytes by its share of
    byte_lengths: the latter is exact wherever byte_lengths are, and both are for a complete pass.
    """

    def __init__(self, size: TextSize, byte_lengths: np.ndarray, tokens: np.ndarray):
        self.size = size
        self.byte_lengths = torch.from_numpy(byte_lengths)
        self.nominal_bytes = int(byte_lengths[tokens].sum())
        self.nats = torch.zeros((), dtype=torch.float64)
        self.scored = torch.zeros((), dtype=torch.int64)
        self.bytes = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        output = model(batch)
        targets = batch.targets[batch.targets >= 0].cpu()
        self.nats += output.loss_sum.double().cpu()
        self.scored += output.count.cpu()
        self.bytes += self.byte_lengths[targets].sum()

    def reduce(self, ranks: Any) -> None:
        self.nats, self.scored, self.bytes = (ranks.sum(x) for x in (self.nats, self.scored, self.bytes))

    def compute(self) -> dict[str, float]:
        nats, tokens = float(self.nats), int(self.scored)
        words = self.size.words * tokens / max(1, self.size.tokens)
        scored_bytes = self.size.bytes * int(self.bytes) / max(1, self.nominal_bytes)
        return {
            "loss": nats / max(1, tokens),
            "perplexity": exp(nats / max(1, tokens)),
            "word_perplexity": exp(nats / words) if words else math.nan,
            "bits_per_byte": nats / math.log(2) / scored_bytes if scored_bytes else math.nan,
            "tokens": float(tokens),
        }


class LastWord:
    """LAMBADA: the share of passages whose last word's every token is the model's first choice, and the perplexity of
    those words (exp of the mean over passages of a word's nats, as lm-evaluation-harness has it)."""

    def __init__(self) -> None:
        self.right = torch.zeros((), dtype=torch.int64)
        self.passages = torch.zeros((), dtype=torch.int64)
        self.nats = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self, model: Any, batch: Batch) -> None:
        h, _ = model.head.embed(batch.inputs, batch.ctx)
        h, _ = model.backbone(h, batch.ctx)
        scored = batch.targets >= 0
        missed = torch.zeros_like(scored)
        missed[scored] = model.head.logits(h[scored], None).argmax(-1) != batch.targets[scored]
        self.right += (~missed.any(dim=1)).sum().cpu()
        self.passages += len(batch.targets)
        self.nats += model.head.loss(h, batch).loss_sum.double().cpu()

    def reduce(self, ranks: Any) -> None:
        self.right, self.passages, self.nats = (ranks.sum(x) for x in (self.right, self.passages, self.nats))

    def compute(self) -> dict[str, float]:
        passages = max(1, int(self.passages))
        return {
            "last_word_accuracy": float(self.right) / passages,
            "last_word_perplexity": exp(float(self.nats) / passages),
            "passages": float(self.passages),
        }


def exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def gzip_bits_per_byte(data: bytes) -> float:
    """What `gzip -9` makes of the same bytes."""
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / max(1, len(data))


def last_word(passage: str) -> tuple[str, str]:
    """'… the old sign' -> ('… the old', ' sign')."""
    head, space, word = passage.rstrip().rpartition(" ")
    return head, space + word


def pad(rows: list[Tensor], value: int) -> Tensor:
    """Rows (n_i,) -> (B, max n), filled on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
