"""The text task: a corpus and a tokenizer as streams of tokens, prompts in, text out."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tasks.text.metrics import LastWord, Likelihood, TextSize, gzip_bits_per_byte, last_word, pad
from tasks.text.tokenizers import (
    OutOfVocabulary,
    Tokenizer,
    checksum,
    load_tokenizer,
    save_tokenizer,
    split_words,
    tokenizers,
)
from zoo import config as configs
from zoo.config import Choice
from zoo.data import Crops, PackedDocuments, Shuffled, SourceStream, StridedWindows, Windows
from zoo.generation import Sampling, generate
from zoo.model import Batch, Context, Model, ModelConfig
from zoo.registry import datasets
from zoo.task import Media, Metric, Task

SEPARATOR = "\n"  # between the documents of a corpus when they are read as one text


class TextTask(Task):
    domain = "text"

    @dataclass
    class Config:
        """context    tokens a training row, and the most that evaluation conditions on
        rows       how training rows are cut: windows that tile the text, random crops, or whole documents packed
                   with nothing leaking between them
        stride     tokens scored per evaluation row, each with at least context - stride before it; 0: half the context
        prompts    continued by `sample_tokens` tokens for TensorBoard
        """

        dataset: Choice | None = configs.choice(datasets, "text/pystdlib")
        tokenizer: Choice | None = configs.choice(tokenizers, "byte")
        context: int = 256
        rows: Literal["windows", "crops", "documents"] = "windows"
        stride: int = 0
        prompts: list[str] = field(default_factory=lambda: ["The "])
        sample_tokens: int = 200

        def __post_init__(self):
            if self.sample_tokens < 1:
                raise ValueError(f"sample_tokens = {self.sample_tokens}; it takes 1 or more")
            if self.context < 1:
                raise ValueError(f"context = {self.context}; it takes 1 or more tokens")
            if not 0 <= self.stride <= self.context:
                raise ValueError(f"stride = {self.stride}; it takes 0 (half the context) to context = {self.context}")

    def __init__(self, config: Config, assets: Path | None = None):
        self.config = config = configs.build(self.Config, config)
        assert config.dataset is not None
        assert config.tokenizer is not None
        self.corpus = datasets.get(config.dataset.name)(config.dataset.config)
        self._assets = assets
        self._tokens: dict[str, np.ndarray] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read from the run's assets, or fitted to the training split."""
        if self._assets is not None:
            return load_tokenizer(self._assets / "tokenizer.json")
        choice = self.config.tokenizer
        assert choice is not None
        return tokenizers.get(choice.name).fit(choice.config, lambda: self.text("train"))

    def save_assets(self, folder: Path) -> None:
        assert self.config.tokenizer is not None
        save_tokenizer(self.config.tokenizer.name, self.tokenizer, folder / "tokenizer.json")

    def model_config(self, config: ModelConfig) -> ModelConfig:
        return configs.build(ModelConfig, config, {"head": {"vocabulary": self.tokenizer.vocabulary}})

    def provenance(self) -> dict[str, Any]:
        """The corpus, by its checksums, and the tokenizer, by its own."""
        named = self.config.tokenizer
        assert named is not None
        tokenizer = {"name": named.name, "vocabulary": self.tokenizer.vocabulary, "sha256": checksum(self.tokenizer)}
        return {**self.corpus.provenance(), "tokenizer": tokenizer}

    # -- data ----------------------------------------------------------------------------------------------------------

    def text(self, split: str) -> str:
        return SEPARATOR.join(self.corpus.documents(split))

    def tokens(self, split: str) -> np.ndarray:
        """(N,) int32, the whole split."""
        if split not in self._tokens:
            try:
                self._tokens[split] = self.tokenizer.encode(self.text(split))
            except OutOfVocabulary as error:
                raise OutOfVocabulary(f"split {split} of {self.provenance()['corpus']}: {error}") from error
        return self._tokens[split]

    def stream(self, split: str, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> SourceStream:
        training = split == "train"
        source = self._training_source(seed) if training else self._evaluation_source(split)
        return SourceStream(source, batch_size=batch_size, rank=rank, world=world, endless=training)

    def _training_source(self, seed: int) -> Any:
        if self.config.rows == "documents":
            documents = [self.tokenizer.encode(text) for text in self.corpus.documents("train")]
            return PackedDocuments(documents, self.config.context, seed=seed)
        cut, have = Windows if self.config.rows == "windows" else Crops, len(self.tokens("train"))
        if have <= self.config.context:
            raise ValueError(
                f"split train has {have} tokens, and rows of task.context = {self.config.context} need one more than "
                "that: give more text, or a smaller task.context"
            )
        return cut(self.tokens("train"), self.config.context, seed=seed)

    def _evaluation_source(self, split: str) -> Any:
        if self._last_word_only:
            passages = [self._passage(text) for text in self.corpus.documents(split)]
            return Shuffled(passages, collate_passages, seed=None)
        return StridedWindows(self.tokens(split), self.config.context, stride=self._stride)

    @property
    def _stride(self) -> int:
        return self.config.stride or max(1, self.config.context // 2)

    @property
    def _last_word_only(self) -> bool:
        assert self.config.dataset is not None
        return self.config.dataset.name == "text/lambada"

    def _passage(self, text: str) -> tuple[Tensor, Tensor]:
        """Inputs (n,) and targets (n,) of one passage; only its last word is scored. A word of more tokens than the
        context is scored in its last ones."""
        head, word = (torch.from_numpy(self.tokenizer.encode(part)).long() for part in last_word(text))
        whole = torch.cat((head, word))[-self.config.context - 1 :]
        targets = whole[1:].clone()
        targets[: max(0, len(targets) - len(word))] = -100
        return whole[:-1], targets

    # -- prompts and text ----------------------------------------------------------------------------------------------

    def prompt(self, obj: str | list[str]) -> Batch:
        """One text or several -> tokens (B, T), padded on the right, with ctx.lengths."""
        texts = [obj] if isinstance(obj, str) else list(obj)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"a prompt is a text, not {type(wrong[0]).__name__}: {wrong[0]!r}")
        rows = [torch.from_numpy(self.tokenizer.encode(text)).long() for text in texts]
        empty = [text for text, row in zip(texts, rows, strict=True) if not len(row)]
        if empty or not rows:
            raise ValueError(
                f"a prompt is empty: {empty[0] if rows else obj!r} holds no token for a model to continue from; "
                "give at least one character, for example a newline"
            )
        return Batch(pad(rows, 0), ctx=Context(lengths=torch.tensor([len(row) for row in rows])))

    def artefact(self, inputs: Tensor) -> str:
        """Tokens (N,) -> text."""
        return self.tokenizer.decode(inputs.numpy())

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def metrics(self, split: str) -> dict[str, Metric]:
        if self._last_word_only:
            return {"last_word": LastWord()}
        tokens, text, lengths = self.tokens(split), self.text(split), self.tokenizer.byte_lengths
        size = TextSize(  # the first token of the text has no context and is not scored
            tokens=len(tokens) - 1,
            words=len(split_words(text)) - 1,
            bytes=len(text.encode("utf-8")) - int(lengths[tokens[0]]),
        )
        return {"likelihood": Likelihood(size, lengths, tokens[1:])}

    def describe(self, split: str) -> str:
        if self._last_word_only:
            return f"last word of each passage, context {self.config.context}"
        context, stride = self.config.context, self._stride
        least = f", each with {context - stride + 1} to {context} tokens before it once the text has them"
        return f"every token but the first scored once, context {context}, stride {stride}{least}"

    def baselines(self, split: str) -> dict[str, float]:
        if self._last_word_only:
            return {}
        return {"gzip_9_bits_per_byte": gzip_bits_per_byte(self.text(split).encode("utf-8"))}

    def show(self, model: nn.Module) -> Media:
        """The prompts, continued."""
        assert isinstance(model, Model)
        if not self.config.prompts:
            return Media()
        drawn = generate(
            model,
            self.prompt(self.config.prompts),
            max_new=self.config.sample_tokens,
            sampling=Sampling(temperature=0.8),
            seed=0,
        ).cpu()
        texts = zip(self.config.prompts, drawn, strict=True)
        return Media(text={f"sample/{i}": prompt + self.artefact(row) for i, (prompt, row) in enumerate(texts)})


def collate_passages(items: list[tuple[Tensor, Tensor]]) -> Batch:
    inputs, targets = zip(*items, strict=True)
    return Batch(pad(list(inputs), 0), pad(list(targets), -100))
