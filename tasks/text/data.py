"""Corpora: documents of plain text, by split. Files are found through `zoo.files.fetch` and checked against a digest.

Each data set is a class with a Config and two methods: `documents(split)` gives a list of texts, `provenance()` what
they are exactly. Splits are train, valid and test.
"""

import hashlib
import json
import logging
import platform
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from zoo.files import fetch

SPLITS = ("train", "valid", "test")
log = logging.getLogger(__name__)


class Corpus(Protocol):
    Config: ClassVar[type]

    def documents(self, split: str) -> list[str]: ...

    def provenance(self) -> dict[str, Any]: ...


def check_split(split: str, accepted: tuple[str, ...], corpus: str) -> None:
    if split not in accepted:
        raise ValueError(f"split {split!r} of {corpus} does not exist; accepted: {', '.join(accepted)}")


def read_checked(name: str, url: str, sha256: str, encoding: str = "utf-8") -> str:
    """The file's text, line ends as they are."""
    return fetch(name, [url], sha256).read_bytes().decode(encoding)


# ---------------------------------------------------------------------------------------------------------------------


class PyStdlib:
    """The running interpreter's own standard library, as Python source: there without a download, for demos and tests.

    It differs between interpreters, so no figure is published on it; the provenance names version and digest. Left out
    are the library's own tests, generated tables (encodings, pydoc_data) and what is not UTF-8. In the order of a hash
    of their path, files validate until that is HELD_OUT bytes, as many test, and the others train.
    """

    HELD_OUT = 150_000

    @dataclass
    class Config:
        pass

    def __init__(self, config: Config):
        self.root = Path(sysconfig.get_paths()["stdlib"])

    def documents(self, split: str) -> list[str]:
        check_split(split, SPLITS, "text/pystdlib")
        documents = split_by_name(read_stdlib(self.root), self.HELD_OUT)[split]
        if not documents:
            raise FileNotFoundError(
                f"text/pystdlib finds no Python source for split {split!r} under {self.root}: this interpreter came "
                "without its sources. Take another one, or your own text: task.dataset.name=text/folder"
            )
        return documents

    def provenance(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, text in read_stdlib(self.root):
            digest.update(name.encode() + b"\0" + text.encode() + b"\0")
        return {"corpus": "text/pystdlib", "python": platform.python_version(), "sha256": digest.hexdigest()}


@cache
def read_stdlib(root: Path) -> list[tuple[str, str]]:
    """(path below root, text) of every module, in the order of the paths."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    left_out |= {"encodings", "pydoc_data"}
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if left_out.intersection(name.parts) or name.parts[0].startswith(("config-", "python")):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            found.append((name.as_posix(), text))
    return found


def split_by_name(files: list[tuple[str, str]], held_out: int) -> dict[str, list[str]]:
    """(name, text) -> texts by split, each in the order given: by hash of the name, `held_out` bytes or little more
    each for valid and test."""
    chosen, sizes = {}, {"valid": 0, "test": 0}
    for name, text in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        split = next((split for split, size in sizes.items() if size < held_out), "train")
        chosen[name] = split
        if split in sizes:
            sizes[split] += len(text.encode())
    return by_split((chosen[name], text) for name, text in files)


class Published:
    """A corpus of files that are known by their digests; there is nothing to set."""

    NAME: ClassVar[str]
    LICENCE: ClassVar[str]
    SHA256: ClassVar[str | dict[str, str]]

    @dataclass
    class Config:
        pass

    def __init__(self, config: Config):
        pass

    def provenance(self) -> dict[str, Any]:
        return {"corpus": self.NAME, "sha256": self.SHA256, "licence": self.LICENCE}


class WikiText2(Published):
    """WikiText-2 (Merity et al., arXiv 1609.07843), word level: 2,088,628 / 217,646 / 245,569 tokens, 33,278 words."""

    NAME, LICENCE = "text/wikitext2", "CC BY-SA"
    URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt"
    SHA256: ClassVar = {
        "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    }

    def documents(self, split: str) -> list[str]:
        check_split(split, SPLITS, self.NAME)
        return [read_checked(f"wikitext-2/{split}.txt", self.URL.format(split), self.SHA256[split])]


class TinyShakespeare(Published):
    """tiny Shakespeare (karpathy/char-rnn): the first 1,003,854 characters train, the last 111,540 validate.

    The corpus has two parts only: split test is the validation part.
    """

    NAME, LICENCE = "text/tinyshakespeare", "public domain text, MIT copy"
    URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def documents(self, split: str) -> list[str]:
        check_split(split, SPLITS, self.NAME)
        text = read_checked("tinyshakespeare/input.txt", self.URL, self.SHA256)
        cut = int(0.9 * len(text))
        return [text[:cut] if split == "train" else text[cut:]]


class Gutenberg(Published):
    """Book-length documents from Project Gutenberg: NLTK's selection and War and Peace, split by whole book.

    Texts are the files as they are, line ends included (Moby Dick and War and Peace have CR LF). Two files are Latin-1,
    seven characters beyond ASCII in all; these count two bytes each in bits per byte.
    """

    NAME, LICENCE = "text/gutenberg", "public domain"
    ARCHIVE = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/gutenberg.zip"
    WAR_AND_PEACE = "https://cs.stanford.edu/people/karpathy/char-rnn/warpeace_input.txt"
    LATIN_1 = ("chesterton-ball", "shakespeare-caesar")
    HELD_OUT: ClassVar = {"valid": ("chesterton-brown",), "test": ("melville-moby_dick",)}
    SHA256: ClassVar = {
        "austen-emma": "71b0923d75fcf2f1faa897b22da8de8e2476d7478a2b22388eb58a3420e00215",
        "austen-persuasion": "cec097657cbfeb62aafe178973f514fa07ab66a5e28ea025ebd5d51ca870e40f",
        "austen-sense": "57b169c7cfa502896dee25bd66616f61cc1d21084caf31f015176ee46fda9718",
        "blake-poems": "840897a66e23a47dd1fd56b864f421b2be0af074dc081244f7995bf26939eee9",
        "chesterton-ball": "c6b6d4e8c09a3f49a09f37f4e47663d4d6f048b62d86c70ccafdfd8f27059a58",
        "chesterton-brown": "67027976205b4b30e367c704807f56c8ffac3e8ea6037d993e57ab1fe28447ec",
        "chesterton-thursday": "8b431a2a8db84089cd6f83fa66610c3b12c04114609df6e90137c0c58f2c5493",
        "melville-moby_dick": "dc2466ee3c2e6e2ea1f86233d142e4b5578fdc1d6f0ca657bee7572202a980c7",
        "milton-paradise": "49028a77c557de1459e96c026edbe72997be2d9015925f7baefb793cd6fe706f",
        "shakespeare-caesar": "7c46bd32fc84d9596bcad55b61ec3c1a390239acb190b286422855aafc2774b3",
        "shakespeare-hamlet": "1eceab7027ad7e0cc25c6b6aadcb2e6bb070395cb2085f775ac732d63d5db240",
        "shakespeare-macbeth": "d4a204352cfe5924cbae76f764225d120e9f7617d39cb8c949dedd3f306353ac",
        "warpeace_input": "cea8ccb6e581165e7b0988ab7e28cccc9447af1e0b1278ac8baeb8f359d9ce62",
        "whitman-leaves": "93ebaf1dccc8f1514b4b1c2f52e64e81829113fc58cff63fb51ada0c72f99c3e",
    }

    def documents(self, split: str) -> list[str]:
        check_split(split, SPLITS, self.NAME)
        held_out = {book for books in self.HELD_OUT.values() for book in books}
        books = self.HELD_OUT.get(split) or [book for book in self.SHA256 if book not in held_out]
        return [self._read(book) for book in books]

    def _read(self, book: str) -> str:
        url = self.WAR_AND_PEACE if book == "warpeace_input" else f"{self.ARCHIVE}#gutenberg/{book}.txt"
        encoding = "latin-1" if book in self.LATIN_1 else "utf-8"
        return read_checked(f"gutenberg/{book}.txt", url, self.SHA256[book], encoding)


class Lambada(Published):
    """LAMBADA (Paperno et al., arXiv 1606.06031), OpenAI's version: passages whose last word is to be predicted."""

    NAME, LICENCE = "text/lambada", "not stated"
    URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
    SHA256 = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"

    def documents(self, split: str) -> list[str]:
        if split != "test":
            raise ValueError(
                f"split {split!r} of text/lambada does not exist; accepted: test. Train on another text, and score the "
                "run with `zoo evaluate RUN task.dataset.name=text/lambada`"
            )
        text = read_checked("lambada/lambada_test.jsonl", self.URL, self.SHA256)
        return [json.loads(line)["text"] for line in text.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------


class Folder:
    """A user's own .txt, .jsonl and .parquet files.

    path   a folder, searched through but for hidden parts, or one file. Sub-folders or files named train, valid and
           test are those splits (and what is under none of these names trains); where no name says so, documents go to
           splits by a hash of their text, so that further documents move none. Where that would hold out less than half
           or more than twice the share, documents being few or of very different length, it is the end of the whole.
    field  of a .jsonl or .parquet row, holding its text
    share  of the bytes for valid and for test, each, where no name says so
    Files that cannot be read (not UTF-8, no such field, damaged) or are empty are skipped, counted and listed; more
    than `max_bad` of them are refused, as is a folder with no text at all.
    """

    @dataclass
    class Config:
        path: str = ""
        field: str = "text"
        share: float = 0.05
        max_bad: int = 10

        def __post_init__(self):
            if not 0 < self.share < 0.5:
                raise ValueError(f"share = {self.share}; it takes a number between 0 and 0.5")
            if self.max_bad < 0:
                raise ValueError(f"max_bad = {self.max_bad}; it takes 0 or more files")

    def __init__(self, config: Config):
        if not config.path:
            raise ValueError(
                "text/folder needs task.dataset.path, a folder or a file with .txt, .jsonl or .parquet text"
            )
        self.config = config
        self.root = Path(config.path).expanduser()
        self.bad: list[str] = []  # file: why it was skipped

    def documents(self, split: str) -> list[str]:
        check_split(split, SPLITS, "text/folder")
        if not self._documents[split]:
            raise ValueError(
                f"{self.root} has no text for split {split!r}: name a sub-folder or a file {split!r}"
                + ("" if self._named else f", or raise task.dataset.share = {self.config.share}")
            )
        return self._documents[split]

    def provenance(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for split, documents in self._documents.items():
            for text in documents:
                digest.update(f"{split} {len(text)} {text}".encode())
        counts = {split: len(documents) for split, documents in self._documents.items()}
        return {"corpus": "text/folder", "sha256": digest.hexdigest(), "documents": counts, "skipped": len(self.bad)}

    @cached_property
    def _files(self) -> list[Path]:
        if not self.root.exists():
            raise FileNotFoundError(f"task.dataset.path = {str(self.root)!r} does not exist")
        if self.root.is_file():
            found = [self.root]
        else:
            found = sorted(p for p in self.root.rglob("*") if p.is_file() and not is_hidden(p.relative_to(self.root)))
        files = [path for path in found if path.suffix.lower() in READERS]
        if not files:
            raise ValueError(f"{self.root} holds no file that can be read; accepted: {', '.join(READERS)}")
        return files

    @cached_property
    def _named(self) -> dict[Path, str]:
        """The files whose split is told by a name below the root, the innermost one."""
        below = {
            path: (*path.relative_to(self.root).parts[:-1], path.stem) for path in self._files if path != self.root
        }
        named = {path: [part for part in parts if part in SPLITS] for path, parts in below.items()}
        return {path: splits[-1] for path, splits in named.items() if splits}

    @cached_property
    def _documents(self) -> dict[str, list[str]]:
        read = [(path, text) for path in self._files for text in self._texts(path)]
        listed = "\n  ".join(self.bad)
        if not read:
            raise ValueError(f"{self.root} has no text: every file is empty or cannot be read:\n  {listed}")
        if self.bad:
            log.warning("%s: %d of %d files were skipped:\n  %s", self.root, len(self.bad), len(self._files), listed)
        if self._named:
            return by_split((self._named.get(path, "train"), text) for path, text in read)
        splits = by_split((hashed_split(text, self.config.share), text) for _, text in read)
        return splits if shares_hold(splits, self.config.share) else cut([text for _, text in read], self.config.share)

    def _texts(self, path: Path) -> list[str]:
        try:
            texts = [text for text in READERS[path.suffix.lower()](path, self.config.field) if text]
            if not texts:
                raise ValueError("empty")
            return texts
        except (ValueError, OSError, TypeError, NotImplementedError) as error:  # pyarrow's own errors are among these
            self.bad.append(f"{path}: {error}")
            if len(self.bad) > self.config.max_bad:
                listed = "\n  ".join(self.bad)
                raise ValueError(
                    f"more than max_bad = {self.config.max_bad} files of task.dataset cannot be read:\n  {listed}"
                ) from error
            return []


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def by_split(documents: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(split, text) -> texts by split, each in the order given."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, text in documents:
        splits[split].append(text)
    return splits


def hashed_split(text: str, share: float) -> str:
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "valid" if place < share else "test" if place < 2 * share else "train"


def shares_hold(splits: dict[str, list[str]], share: float) -> bool:
    """Whether valid and test have half to twice their share of all bytes."""
    sizes = {split: sum(len(text.encode()) for text in documents) for split, documents in splits.items()}
    least, most = share / 2 * sum(sizes.values()), share * 2 * sum(sizes.values())
    return all(least <= sizes[split] <= most for split in ("valid", "test"))


def cut(documents: list[str], share: float) -> dict[str, list[str]]:
    """The beginning of the whole trains, its end validates and tests, by bytes; a document on a border is parted."""
    encoded = [text.encode() for text in documents]
    total = sum(map(len, encoded))
    borders = [0, int(total * (1 - 2 * share)), int(total * (1 - share)), total]
    parts, at = [], 0
    for text, data in zip(documents, encoded, strict=True):
        places = [len(data[: max(0, border - at)].decode(errors="ignore")) for border in borders]  # whole characters
        parts += [
            (split, text[begin:end])
            for split, begin, end in zip(SPLITS, places, places[1:], strict=False)
            if begin < end
        ]
        at += len(data)
    return by_split(parts)


def read_txt(path: Path, field: str) -> list[str]:
    try:
        return [path.read_bytes().decode("utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def read_jsonl(path: Path, field: str) -> list[str]:
    texts = []
    for number, line in enumerate(read_txt(path, field)[0].split("\n"), 1):  # JSON strings may hold other line ends
        if not line.strip():
            continue
        try:
            texts.append(text_field(json.loads(line), field))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return texts


def text_field(row: Any, field: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"no text in field {field!r} (task.dataset.field); the row has: {has}")
    row[field].encode("utf-8")  # half a surrogate pair, which JSON can write, raises
    return row[field]


def read_parquet(path: Path, field: str) -> list[str]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    names = table.schema_arrow.names
    if field not in names:
        raise ValueError(f"no column {field!r} (task.dataset.field); the file has: {', '.join(names)}")
    values = table.read(columns=[field]).column(field).to_pylist()
    return [text_field({field: value}, field) for value in values if value is not None]


READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
