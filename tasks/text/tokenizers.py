"""Text to token ids and back: bytes, characters, words, byte-pair encoding.

Every tokenizer is built by `fit`, which calls for the training text if it needs it, or read back by `load_tokenizer`;
both give the same ids for ever after, and `checksum` names them. Bytes and byte pairs take any text; characters and
words raise OutOfVocabulary.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, trainers

from zoo.registry import Registry

tokenizers = Registry("tokenizer")


class OutOfVocabulary(ValueError):
    """Text that a tokenizer has no token for, or an id that it has no text for."""


class Tokenizer(Protocol):
    Config: ClassVar[type]

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: the bytes of text behind each id. They add up to a text's own, but for words where the text has
        other white space than one space between words, or <unk> stands for something else."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32. Raises OutOfVocabulary naming what is unknown and where."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Bytes that are no UTF-8 become U+FFFD. Raises OutOfVocabulary for an id that is none of its own."""
        ...

    def dump(self) -> Any:
        """What `restore` needs, as JSON values."""
        ...


def utf8(text: str) -> bytes:
    """Raises OutOfVocabulary for half a surrogate pair, which a str can hold and no encoding of text can."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OutOfVocabulary(
            f"character {text[error.start]!r} at place {error.start} cannot stand in a text"
        ) from error


def check_ids(ids: np.ndarray, vocabulary: int, tokenizer: str) -> np.ndarray:
    ids = np.asarray(ids)
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        place = int(wrong.argmax())
        raise OutOfVocabulary(
            f"token {int(ids[place])} at place {place} is none of the {vocabulary} of this {tokenizer} tokenizer "
            f"(0 to {vocabulary - 1})"
        )
    return ids


@tokenizers.register("byte")
class ByteTokenizer:
    """UTF-8 bytes: 256 ids, nothing to fit, nothing unknown."""

    @dataclass
    class Config:
        pass

    vocabulary = 256
    byte_lengths = np.ones(256, dtype=np.int64)

    @classmethod
    def fit(cls, config: Config, read: Callable[[], str]) -> "ByteTokenizer":
        return cls()

    @classmethod
    def restore(cls, state: Any) -> "ByteTokenizer":
        return cls()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return check_ids(ids, self.vocabulary, "byte").astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def dump(self) -> Any:
        return {}


@tokenizers.register("char")
class CharTokenizer:
    """The characters that occur in the training text, in code-point order."""

    @dataclass
    class Config:
        pass

    def __init__(self, characters: str):
        if not characters:
            raise ValueError("a char tokenizer needs a training text with at least one character")
        self.characters = characters
        self._points = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)

    @classmethod
    def fit(cls, config: Config, read: Callable[[], str]) -> "CharTokenizer":
        return cls("".join(sorted(set(read()))))

    @classmethod
    def restore(cls, state: Any) -> "CharTokenizer":
        return cls(state["characters"])

    @property
    def vocabulary(self) -> int:
        return len(self.characters)

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.array([len(character.encode("utf-8")) for character in self.characters], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        ids = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            place = int(unknown.argmax())
            raise OutOfVocabulary(
                f"character {text[place]!r} at place {place} is not among this char tokenizer's {self.vocabulary}; "
                "the byte tokenizer takes any text"
            )
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self.characters[i] for i in check_ids(ids, self.vocabulary, "char"))

    def dump(self) -> Any:
        return {"characters": self.characters}


@tokenizers.register("word")
class WordTokenizer:
    """Words between white space, and <eos> at the end of each line: WikiText's own units.

    Ids go by first occurrence in the training text. A word that does not occur there is <unk>, if <unk> is a word of
    the text (WikiText has it) or `unknown` adds it; else it raises OutOfVocabulary. `max_words` keeps the most frequent
    ones only, and makes <unk> of the others (0: all).
    """

    @dataclass
    class Config:
        max_words: int = 0
        unknown: bool = False

        def __post_init__(self):
            if self.max_words < 0 or self.max_words == 1:
                raise ValueError(f"max_words = {self.max_words}; it takes 0 (all), or 2 or more: <unk> is one of them")

    def __init__(self, words: list[str]):
        self.words = words
        self._ids = {word: i for i, word in enumerate(words)}
        self._unknown = self._ids.get("<unk>")

    @classmethod
    def fit(cls, config: Config, read: Callable[[], str]) -> "WordTokenizer":
        counts = Counter(split_words(read()))
        words = list(counts)
        if config.max_words and len(words) > config.max_words:
            kept = {word for word, _ in counts.most_common(config.max_words - 1)} | {"<unk>"}
            words = [word for word in (*words, "<unk>") if word in kept]
        if config.unknown:
            words.append("<unk>")
        return cls(list(dict.fromkeys(words)))

    @classmethod
    def restore(cls, state: Any) -> "WordTokenizer":
        return cls(state["words"])

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    @property
    def byte_lengths(self) -> np.ndarray:
        """A word or a newline, and the space before it."""
        return np.array(
            [2 if word == "<eos>" else len(word.encode("utf-8")) + 1 for word in self.words], dtype=np.int64
        )

    def encode(self, text: str) -> np.ndarray:
        words = split_words(text)
        ids = [self._ids.get(word, self._unknown) for word in words]
        if self._unknown is None and None in ids:
            place = ids.index(None)
            raise OutOfVocabulary(
                f"word {words[place]!r} at place {place} is not among the {self.vocabulary} words of this word "
                "tokenizer, which has no <unk>; tokenizer.unknown=true adds that"
            )
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """A space stands before each word and line end, as in WikiText, whose bytes these are exactly."""
        words = (self.words[i] for i in check_ids(ids, self.vocabulary, "word"))
        return "".join(" \n" if word == "<eos>" else " " + word for word in words)

    def dump(self) -> Any:
        return {"words": self.words}


def split_words(text: str) -> list[str]:
    """Words, with <eos> for each newline; a text that does not end in one gets none at its end."""
    lines = text.split("\n")
    words = []
    for line in lines[:-1]:
        words += line.split()
        words.append("<eos>")
    return words + lines[-1].split()


@tokenizers.register("bpe")
class BpeTokenizer:
    """Byte-level byte-pair encoding (Radford et al. 2019), trained by the `tokenizers` library; nothing is unknown."""

    @dataclass
    class Config:
        size: int = 8192

        def __post_init__(self):
            if self.size < 257:
                raise ValueError(f"size = {self.size}; byte-level BPE takes 257 or more")

    def __init__(self, bpe: Bpe):
        self._bpe = bpe

    @classmethod
    def fit(cls, config: Config, read: Callable[[], str]) -> "BpeTokenizer":
        bpe = Bpe(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.size, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(read().splitlines(keepends=True), trainer)
        return cls(bpe)

    @classmethod
    def restore(cls, state: Any) -> "BpeTokenizer":
        try:
            return cls(Bpe.from_str(json.dumps(state)))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"no byte-pair encoding: {error}") from error

    @property
    def vocabulary(self) -> int:
        return self._bpe.get_vocab_size()

    @property
    def byte_lengths(self) -> np.ndarray:
        # ByteLevel writes each byte as one printable character, so a token's characters count its bytes.
        return np.array([len(self._bpe.id_to_token(i) or "") for i in range(self.vocabulary)], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        pieces = self._bpe.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
        return np.fromiter((i for piece in pieces for i in piece.ids), dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._bpe.decode(check_ids(ids, self.vocabulary, "bpe").tolist(), skip_special_tokens=False)

    def dump(self) -> Any:
        return json.loads(self._bpe.to_str())


def checksum(tokenizer: Tokenizer) -> str:
    """sha256 of what the tokenizer consists of: equal checksums, equal ids."""
    return hashlib.sha256(json.dumps(tokenizer.dump(), sort_keys=True).encode()).hexdigest()


def save_tokenizer(name: str, tokenizer: Tokenizer, path: Path) -> None:
    stored = {"tokenizer": name, "sha256": checksum(tokenizer), "state": tokenizer.dump()}
    path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError naming the file when it holds no tokenizer, or another one than was saved."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = tokenizers.get(stored["tokenizer"]).restore(stored["state"])
        expected = stored["sha256"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no tokenizer: {type(error).__name__}: {error}") from error
    if checksum(tokenizer) != expected:
        raise ValueError(f"{path} is damaged: its tokenizer has sha256 {checksum(tokenizer)}, not {expected}")
    return tokenizer
