"""Corpora: the standard counts, a user's own files, and what happens when a file is absent, damaged or empty."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tasks.text.tokenizers import WordTokenizer
from zoo import config
from zoo.files import ChecksumError, DataMissing
from zoo.registry import datasets


def corpus(name, **fields):
    entry = datasets.get(name)
    return entry(config.build(entry.Config, fields))


def test_wikitext2_has_the_published_counts(data_root):
    wikitext = corpus("text/wikitext2")
    train = wikitext.documents("train")[0]
    words = WordTokenizer.fit(WordTokenizer.Config(), lambda: train)
    assert words.vocabulary == 33_278
    for split, tokens, size in (
        ("train", 2_088_628, 10_797_148),
        ("valid", 217_646, 1_121_681),
        ("test", 245_569, 1_256_449),
    ):
        text = wikitext.documents(split)[0]
        ids = words.encode(text)
        assert len(ids) == tokens
        assert words.byte_lengths[ids].sum() == len(text.encode()) == size


def test_tinyshakespeare_split(data_root):
    shakespeare = corpus("text/tinyshakespeare")
    train, valid = shakespeare.documents("train")[0], shakespeare.documents("valid")[0]
    assert (len(train), len(valid), len(set(train))) == (1_003_854, 111_540, 65)


def test_gutenberg_is_split_by_book(data_root):
    gutenberg = corpus("text/gutenberg")
    parts = {split: gutenberg.documents(split) for split in ("train", "valid", "test")}
    assert {split: len(books) for split, books in parts.items()} == {"train": 12, "valid": 1, "test": 1}
    assert "Call me Ishmael" in parts["test"][0]


def test_lambada(data_root):
    passages = corpus("text/lambada").documents("test")
    assert len(passages) == 5153
    with pytest.raises(ValueError, match="split 'train' of text/lambada does not exist; accepted: test"):
        corpus("text/lambada").documents("train")


def test_pystdlib_needs_no_download():
    stdlib = corpus("text/pystdlib")
    parts = {split: stdlib.documents(split) for split in ("train", "valid", "test")}
    assert all(parts.values())
    assert not set(parts["train"]) & set(parts["valid"])
    assert len(stdlib.provenance()["sha256"]) == 64


def test_absent_data_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "shared"))
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataMissing) as error:
        corpus("text/gutenberg").documents("valid")
    for word in (
        "gutenberg/chesterton-brown.txt",
        str(tmp_path / "shared"),
        str(tmp_path / "cache"),
        "67027976",
        "ZOO_DATA",
    ):
        assert word in str(error.value)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    path = tmp_path / "tinyshakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_text("First Citizen: nothing")
    with pytest.raises(ChecksumError, match="86c4e6aa"):
        corpus("text/tinyshakespeare").documents("train")


# ---------------------------------------------------------------------------------------------------------------------


def test_folder_reads_all_formats(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("from txt")
    (tmp_path / "train" / "b.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["held out", None]}), tmp_path / "valid.parquet")
    folder = corpus("text/folder", path=str(tmp_path), field="body")
    assert folder.documents("train") == ["from txt", "one", "two"]
    assert folder.documents("valid") == ["held out"]
    with pytest.raises(ValueError, match="no text for split 'test'"):
        folder.documents("test")


def test_folder_without_named_splits(tmp_path):
    (tmp_path / "one.txt").write_text("x" * 1000)
    folder = corpus("text/folder", path=str(tmp_path / "one.txt"))
    assert [len(folder.documents(split)[0]) for split in ("train", "valid", "test")] == [900, 50, 50]

    rows = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "rows.jsonl").write_text("\n".join(rows))
    many = corpus("text/folder", path=str(tmp_path / "many"))
    parts = [set(many.documents(split)) for split in ("train", "valid", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 400
    assert all(len(part) > 5 for part in parts)


def test_folder_skips_counts_and_lists_bad_files(tmp_path):
    (tmp_path / "good.txt").write_text("good " * 100)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "row.jsonl").write_text('{"other": "x"}\n')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 nothing")
    folder = corpus("text/folder", path=str(tmp_path))
    assert folder.documents("train")[0].startswith("good")
    assert len(folder.bad) == 3
    listed = "\n".join(folder.bad)
    for words in ("latin.txt: not UTF-8 at byte 3", "line 1: no text in field 'text'", "cut.parquet"):
        assert words in listed
    with pytest.raises(ValueError, match=r"more than max_bad = 1"):
        corpus("text/folder", path=str(tmp_path), max_bad=1).documents("train")


@pytest.mark.parametrize(
    ("files", "words"),
    [({}, "no file that can be read"), ({"a.txt": ""}, "empty"), ({"a.pdf": "x"}, "accepted: .txt, .jsonl, .parquet")],
)
def test_folder_with_nothing_to_read(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        corpus("text/folder", path=str(tmp_path)).documents("train")


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        corpus("text/folder", path=str(tmp_path / "no")).documents("train")
    with pytest.raises(ValueError, match=r"task\.dataset\.path"):
        corpus("text/folder")
