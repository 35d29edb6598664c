"""Perplexities, bits per byte and last-word accuracy, as sums over tokens: independent of batches and ranks."""

import gzip
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.model import Batch, Model


class Likelihood:
    """loss in nats a token; perplexity a token and a word; bits per byte of the text that was scored.

    byte_lengths  (V,) bytes of text behind each token id
    words         of the whole text, each line's end counted as one, as WikiText's published perplexities do
    tokens        that a complete pass scores; with fewer, the words are counted in proportion
    """

    def __init__(self, byte_lengths: np.ndarray, words: int, tokens: int):
        self.byte_lengths = torch.from_numpy(byte_lengths)
        self.words, self.tokens = words, tokens
        self.nats = torch.zeros((), dtype=torch.float64)
        self.scored = torch.zeros((), dtype=torch.int64)
        self.bytes = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: Model, batch: Batch) -> None:
        output = model(batch)
        targets = batch.targets[batch.targets >= 0].cpu()
        self.nats += output.loss_sum.double().cpu()
        self.scored += output.count.cpu()
        self.bytes += self.byte_lengths[targets].sum()

    def reduce(self, ranks: Any) -> None:
        self.nats, self.scored, self.bytes = (ranks.sum(x) for x in (self.nats, self.scored, self.bytes))

    def compute(self) -> dict[str, float]:
        nats, scored = float(self.nats), int(self.scored)
        words = self.words * scored / max(1, self.tokens)
        return {
            "loss": nats / max(1, scored),
            "perplexity": exp(nats / max(1, scored)),
            "word_perplexity": exp(nats / max(1.0, words)),
            "bits_per_byte": nats / math.log(2) / max(1, int(self.bytes)),
            "tokens": float(scored),
        }


class LastWordAccuracy:
    """The share of passages whose last word's every token is the model's first choice (LAMBADA)."""

    def __init__(self) -> None:
        self.right = torch.zeros((), dtype=torch.int64)
        self.passages = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: Model, batch: Batch) -> None:
        h, _ = model.head.embed(batch.inputs, batch.ctx)
        h, _ = model.backbone(h, batch.ctx)
        scored = batch.targets >= 0
        missed = torch.zeros_like(scored)
        missed[scored] = model.head.logits(h[scored], None).argmax(-1) != batch.targets[scored]
        self.right += (~missed.any(dim=1)).sum().cpu()
        self.passages += len(batch.targets)

    def reduce(self, ranks: Any) -> None:
        self.right, self.passages = ranks.sum(self.right), ranks.sum(self.passages)

    def compute(self) -> dict[str, float]:
        return {"last_word_accuracy": float(self.right) / max(1, int(self.passages))}


def exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def gzip_bits_per_byte(text: str) -> float:
    """What `gzip -9` makes of the same bytes."""
    data = text.encode("utf-8")
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / max(1, len(data))


def last_word(passage: str) -> tuple[str, str]:
    """'… the old sign' -> ('… the old', ' sign')."""
    head, space, word = passage.rstrip().rpartition(" ")
    return head, space + word


def pad(rows: list[Tensor], value: int) -> Tensor:
    """Rows (n_i,) -> (B, max n), filled on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
