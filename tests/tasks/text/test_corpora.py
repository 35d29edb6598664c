"""Corpora in detail: which bytes they are, where they come from, and a user's own files in every state."""

import hashlib
import json
import logging
import platform
import shutil
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from tasks.text.data import SPLITS, Folder, Gutenberg, Lambada, PyStdlib, TinyShakespeare, WikiText2, split_by_name
from zoo import config as configs
from zoo.files import ChecksumError, DataMissing
from zoo.registry import datasets


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def empty_places(monkeypatch, tmp_path, no_network):
    """ZOO_DATA and the cache, both empty."""
    for name in ("ZOO_DATA", "ZOO_CACHE"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# The standard corpora


def test_they_are_listed():
    names = {f"text/{name}" for name in ("pystdlib", "wikitext2", "tinyshakespeare", "gutenberg", "lambada", "folder")}
    assert names <= set(datasets.names("text/*"))


def test_pystdlib():
    corpus = PyStdlib(PyStdlib.Config())
    parts = {split: corpus.documents(split) for split in SPLITS}
    assert parts["train"] == PyStdlib(PyStdlib.Config()).documents("train")
    sizes = [sum(map(len, parts[split])) for split in SPLITS]
    assert sizes[0] > 3_000_000
    assert all(140_000 < size < 900_000 for size in sizes[1:])
    assert not set(parts["train"]) & set(parts["valid"] + parts["test"])
    provenance = corpus.provenance()
    assert provenance["python"] == platform.python_version()
    assert len(provenance["sha256"]) == 64


def test_splits_by_name():
    files = [(f"module{i}.py", f"{i:010d}") for i in range(1000)]
    parts = split_by_name(files, 95)
    assert [len(parts[split]) for split in SPLITS] == [980, 10, 10]
    assert sorted(sum(parts.values(), [])) == [text for _, text in files]
    assert split_by_name(files[::-1], 95) == {split: texts[::-1] for split, texts in parts.items()}
    assert split_by_name(files[:3], 1000) == {"train": [], "valid": [text for _, text in files[:3]], "test": []}


def test_pystdlib_without_sources(tmp_path):
    corpus = PyStdlib(PyStdlib.Config())
    corpus.root = tmp_path
    with pytest.raises(FileNotFoundError, match="came without its sources"):
        corpus.documents("train")


def test_gutenberg(data_root):
    corpus = Gutenberg(Gutenberg.Config())
    books = {split: corpus.documents(split) for split in SPLITS}
    assert [len(books[split]) for split in SPLITS] == [12, 1, 1]
    assert books["valid"][0].startswith("[The Wisdom of Father Brown")
    assert books["test"][0].startswith("[Moby Dick by Herman Melville")
    assert len(books["test"][0].encode()) == 1242990
    assert "Brunetière" in "".join(books["train"])
    # seven characters of the two Latin-1 files take a second byte
    assert sum(len(text.encode()) for text in books["train"]) == 9313405 - 1242990 - 406629 + 7


def test_lambada_is_a_test_alone():
    with pytest.raises(ValueError, match=r"accepted: test.*evaluate RUN task.dataset.name=text/lambada"):
        Lambada(Lambada.Config()).documents("train")


@pytest.mark.parametrize("kind", [PyStdlib, WikiText2, TinyShakespeare, Gutenberg])
def test_unknown_split(kind):
    with pytest.raises(ValueError, match="split 'validation' of .* does not exist; accepted: train, valid, test"):
        kind(kind.Config()).documents("validation")


@pytest.mark.parametrize(
    ("kind", "file", "address"),
    [
        (WikiText2, "wikitext-2/train.txt", "pytorch/examples"),
        (TinyShakespeare, "tinyshakespeare/input.txt", "karpathy/char-rnn"),
        (Gutenberg, "gutenberg/austen-emma.txt", "nltk/nltk_data"),
    ],
)
def test_absent_data_says_where_it_looked_and_how_to_get_it(kind, file, address, empty_places):
    with pytest.raises(DataMissing) as missing:
        kind(kind.Config()).documents("train")
    message = str(missing.value)
    assert str(empty_places / "ZOO_DATA" / file) in message
    assert str(empty_places / "ZOO_CACHE" / file) in message
    for part in (address, "no network in tests", "sha256: ", "To place it by hand", "ZOO_DATA"):
        assert part in message


@pytest.mark.parametrize("content", ["", "To be, or not to be"])
def test_other_bytes_are_refused(content, empty_places):
    path = empty_places / "ZOO_DATA" / "tinyshakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ChecksumError, match=r"input.txt has sha256 .*, not 86c4e6aa"):
        TinyShakespeare(TinyShakespeare.Config()).documents("train")


def test_a_book_comes_out_of_the_archive(empty_places, monkeypatch):
    """One download for all books; what is in the archive is checked, and a wrong one does not stay."""
    texts = {"austen-emma": "[Emma]\r\n", "melville-moby_dick": "Call me\r\n", "chesterton-brown": "wrong"}
    archive = empty_places / "gutenberg.zip"
    with zipfile.ZipFile(archive, "w") as files:
        for book, text in texts.items():
            files.writestr(f"gutenberg/{book}.txt", text)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(archive))
    monkeypatch.setattr(Gutenberg, "SHA256", {b: hashlib.sha256(t.encode()).hexdigest() for b, t in texts.items()})
    monkeypatch.setitem(Gutenberg.SHA256, "chesterton-brown", "0" * 64)
    corpus = Gutenberg(Gutenberg.Config())
    assert corpus.documents("train") == ["[Emma]\r\n"]
    archive.unlink()
    assert corpus.documents("test") == ["Call me\r\n"]
    kept = empty_places / "ZOO_CACHE" / "gutenberg" / "gutenberg.zip"
    assert kept.is_file()
    with pytest.raises(DataMissing, match="chesterton-brown.txt: .* has sha256"):
        corpus.documents("valid")
    assert not kept.exists()
    assert not list(kept.parent.glob("*.part"))


class Answer:
    """What urlopen gives, from a file."""

    headers: dict = {}  # noqa: RUF012

    def __init__(self, path):
        self.file = path.open("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, count=-1):
        return self.file.read(count)


# ---------------------------------------------------------------------------------------------------------------------
# A user's own files


def folder(root, **fields):
    return Folder(configs.build(Folder.Config, {"path": str(root), **fields}))


def write(path, documents, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_bytes(documents[0].encode())
    elif path.suffix == ".jsonl":
        path.write_bytes("\n".join(json.dumps({field: text}, ensure_ascii=False) for text in documents).encode())
    else:
        pyarrow.parquet.write_table(pyarrow.table({field: documents, "year": [1900] * len(documents)}), path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".TXT"])
def test_every_format_and_named_splits(tmp_path, suffix):
    texts = {"train": "one\r\ntwo\u2028\u0085", "valid": "drei ä", "test": "四"}
    for split, text in texts.items():
        path = tmp_path / split / "part.txt"
        write(path.with_suffix(suffix.lower()), [text])
        path.with_suffix(suffix.lower()).rename(path.with_suffix(suffix))
    corpus = folder(tmp_path)
    assert {split: corpus.documents(split) for split in SPLITS} == {split: [text] for split, text in texts.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_field_go_to_splits_by_their_hash(tmp_path, suffix):
    texts = [f"document {i}" for i in range(400)]
    write(tmp_path / f"all{suffix}", texts, field="body")
    corpus = folder(tmp_path / f"all{suffix}", field="body", share=0.1)
    parts = {split: corpus.documents(split) for split in SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(texts)
    assert 20 < len(parts["valid"]) < 60
    write(tmp_path / f"more{suffix}", [*texts, "another"], field="body")
    more = folder(tmp_path / f"more{suffix}", field="body", share=0.1)
    assert set(parts["valid"]) <= set(more.documents("valid"))  # more documents move none


def test_one_text_is_cut(tmp_path):
    write(tmp_path / "book.txt", ["".join(chr(0x4E00 + i) for i in range(1000))])
    corpus = folder(tmp_path, share=0.1)
    assert [len(corpus.documents(split)[0]) for split in SPLITS] == [800, 100, 100]


@pytest.mark.parametrize("sizes", [[10] * 3, [9000, *[7] * 100], [*[7] * 100, 9000], [50, 3000, 3, 2000] * 3])
def test_held_out_is_a_share_of_the_bytes(tmp_path, sizes):
    documents = [(f"{i} ä" * size)[:size] for i, size in enumerate(sizes)]
    write(tmp_path / "all.jsonl", documents)
    corpus = folder(tmp_path, share=0.1)
    held = {split: sum(len(text.encode()) for text in corpus.documents(split)) for split in SPLITS}
    total = sum(len(text.encode()) for text in documents)
    assert sum(held.values()) == total  # nothing lost, nothing twice
    assert all(0.05 * total <= held[split] <= 0.2 * total for split in ("valid", "test")), held
    assert "".join(sorted("".join(sum((corpus.documents(split) for split in SPLITS), [])))) == "".join(
        sorted("".join(documents))
    )


def test_what_cannot_be_read_is_skipped_and_listed(tmp_path, caplog):
    write(tmp_path / "train" / "good.txt", ["fine"])
    (tmp_path / "train" / "empty.txt").write_bytes(b"")
    (tmp_path / "train" / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "train" / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "train" / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "train" / "field.jsonl").write_text('{"body": "a"}')
    (tmp_path / "train" / "number.jsonl").write_text('{"text": 3}')
    (tmp_path / "train" / "half.jsonl").write_text('{"text": "\\ud800"}')
    write(tmp_path / "train" / "other.parquet", ["a"], field="body")
    (tmp_path / "train" / ".hidden.txt").write_text("not read")
    (tmp_path / "train" / "notes.md").write_text("not read")
    corpus = folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert corpus.documents("train") == ["fine"]
    assert len(corpus.bad) == corpus.provenance()["skipped"] == 8
    assert "8 of 9 files were skipped" in caplog.text
    listed = "\n".join(corpus.bad)
    for part in (
        "empty.txt: empty",
        "latin.txt: not UTF-8 at byte 2",
        "broken.jsonl: line 2",
        "field.jsonl: line 1: no text in field 'text'",
        "the row has: body",
        "other.parquet: no column 'text'",
        "the file has: body, year",
    ):
        assert part in listed
        assert part in caplog.text
    with pytest.raises(ValueError, match=r"(?s)more than max_bad = 2 files of task.dataset cannot be read:.*empty"):
        folder(tmp_path, max_bad=2).documents("train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "holds no file that can be read; accepted: .txt, .jsonl, .parquet"),
        (lambda root: write(root / "a.txt", [""]), r"has no text: every file is empty .*\n.*a.txt: empty"),
        (lambda root: write(root / "train.txt", ["a"]), "no text for split 'valid': name a sub-folder or a file"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    make(tmp_path / "mine")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder(tmp_path / "mine").documents("valid")


def test_provenance_names_texts_not_places(tmp_path):
    for place in ("here", "there"):
        write(tmp_path / place / "train.txt", ["same"])
    shutil.copytree(tmp_path / "here", tmp_path / "other")
    (tmp_path / "other" / "train.txt").write_text("else")
    here, there, other = (folder(tmp_path / place).provenance() for place in ("here", "there", "other"))
    assert here == there
    assert here != other


@pytest.mark.parametrize("wrong", [{"share": 0.5}, {"share": 0.0}, {"max_bad": -1}])
def test_folder_settings(wrong):
    with pytest.raises(configs.ConfigError, match="it takes"):
        configs.build(Folder.Config, wrong)
