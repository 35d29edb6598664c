"""Data files: found, downloaded once, and checked to the last byte."""

import hashlib

import pytest

from zoo.files import ChecksumError, DataMissing, fetch

TEXT = b"some data"
SHA = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "shared"))
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "origin.txt").write_bytes(TEXT)
    return tmp_path


def put(path, data=TEXT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_fetch_downloads_once_and_prefers_what_is_there(places):
    address = (places / "origin.txt").as_uri()
    cached = places / "cache" / "set" / "a.txt"
    assert fetch("set/a.txt", [address], SHA) == cached
    assert [path.name for path in cached.parent.iterdir()] == ["a.txt"]
    assert fetch("set/a.txt", [], SHA) == cached
    shared = put(places / "shared" / "set" / "a.txt")
    assert fetch("set/a.txt", [], SHA) == shared
    given = put(places / "given" / "set" / "a.txt")
    assert fetch("set/a.txt", [], SHA, root=places / "given") == given


def test_fetch_says_what_to_do(places):
    address = (places / "nothing.txt").as_uri()
    with pytest.raises(DataMissing) as missing:
        fetch("set/b.txt", [address], SHA)
    for words in ("shared/set/b.txt", "cache/set/b.txt", address, SHA, "ZOO_DATA", "copy the file to"):
        assert words in str(missing.value)
    with pytest.raises(DataMissing, match="no address"):
        fetch("set/b.txt", [], SHA)


def test_fetch_checks_every_byte(places):
    damaged = put(places / "shared" / "set" / "c.txt", TEXT + b"!")
    with pytest.raises(ChecksumError) as wrong:
        fetch("set/c.txt", [], SHA)
    for words in (str(damaged), SHA, hashlib.sha256(TEXT + b"!").hexdigest()):
        assert words in str(wrong.value)
    (places / "origin.txt").write_bytes(b"other data")
    with pytest.raises(DataMissing, match="has sha256"):
        fetch("set/d.txt", [(places / "origin.txt").as_uri()], SHA)
    assert not list((places / "cache").rglob("*d.txt*"))
