"""Tokenizers: round trips, what is unknown, and how many bytes each id stands for."""

import numpy as np
import pytest

from tasks.text.tokenizers import OutOfVocabulary, load_tokenizer, save_tokenizer, tokenizers
from zoo import config

TEXT = "The quick brown fox\njumps over  the lazy dog: naïve café, 中文, 🙂.\n\nThe end\n"


def fitted(name, text=TEXT, **fields):
    entry = tokenizers.get(name)
    return entry.fit(config.build(entry.Config, fields), lambda: text)


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_any_text_comes_back(name, tmp_path):
    tokenizer = fitted(name)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.max() < tokenizer.vocabulary
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())

    save_tokenizer(name, tokenizer, tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode(TEXT).tolist() == ids.tolist()
    assert again.vocabulary == tokenizer.vocabulary


def test_words_and_line_ends(tmp_path):
    tokenizer = fitted("word", " a b \n \n a c \n")
    assert tokenizer.words == ["a", "b", "<eos>", "c"]
    assert tokenizer.encode(" c a \n").tolist() == [3, 0, 2]
    assert tokenizer.decode(np.array([0, 1, 2, 3])) == " a b \n c"
    save_tokenizer("word", tokenizer, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").words == tokenizer.words


def test_unknown_is_named_with_its_place():
    with pytest.raises(OutOfVocabulary, match="'z' at place 2"):
        fitted("char", "ab").encode("abz")
    with pytest.raises(OutOfVocabulary, match="'zebra' at place 1"):
        fitted("word", "a b\n").encode("a zebra")
    assert fitted("word", "a <unk> b\n").encode("a zebra").tolist() == [0, 1]


def test_the_most_frequent_words():
    tokenizer = fitted("word", "a a a b b c\n", max_words=3)
    assert tokenizer.words == ["a", "b", "<unk>"]


def test_bytes_cut_within_a_character():
    assert fitted("byte").decode(np.frombuffer("é".encode()[:1], np.uint8)) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("content", ["", "{}", '{"tokenizer": "char", "state": {}}', "not json", "[1]"])
def test_a_file_without_a_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json holds no tokenizer"):
        load_tokenizer(path)


def test_bpe_is_bounded_below():
    with pytest.raises(config.ConfigError, match="size = 10"):
        fitted("bpe", size=10)
