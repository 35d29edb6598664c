"""Tokenizers at the edges: odd text, what is unknown, damaged files; the same after saving and in another process."""

import json

import numpy as np
import pytest

from tasks.text.data import WikiText2
from tasks.text.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    OutOfVocabulary,
    WordTokenizer,
    checksum,
    load_tokenizer,
    save_tokenizer,
    split_words,
    tokenizers,
)

CORPUS = "the cat sat on the mat .\nthe dog , naïve , saw <unk> — 𝄞 \U0001f600 !\n\n\tdef f(x):\r\n    return x\n" * 8


def fitted(name):
    config = BpeTokenizer.Config(300) if name == "bpe" else tokenizers.get(name).Config()
    return tokenizers.get(name).fit(config, lambda: CORPUS)


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
@pytest.mark.parametrize("text", [CORPUS, "a", "", "the mat", "\n\n \r\n\t", "😀𝄞ï—"])
def test_there_and_back(name, text):
    tokenizer = fitted(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocabulary
    assert tokenizer.byte_lengths.shape == (tokenizer.vocabulary,)
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_words_there_and_back():
    tokenizer = fitted("word")
    text = " the cat saw the dog \n \n the mat \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("zebra the").tolist() == tokenizer.encode("<unk> the").tolist()


def test_decoding_goes_on_where_it_was():
    """What is shown while a text is drawn does not change when it grows."""
    tokenizer = fitted("word")
    ids = tokenizer.encode(CORPUS)
    for n in range(0, 60, 7):
        assert tokenizer.decode(ids).startswith(tokenizer.decode(ids[:n]))


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_half_a_character_is_replaced(name):
    tokenizer = fitted(name)
    ids = ByteTokenizer().encode("é")[:1] if name == "byte" else tokenizer.encode("é")[:1]
    assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte", "char", "word", "bpe"])
def test_saved_is_the_same(name, tmp_path):
    tokenizer = fitted(name)
    path = tmp_path / "tokenizer.json"
    save_tokenizer(name, tokenizer, path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert checksum(loaded) == checksum(tokenizer) == checksum(fitted(name))
    np.testing.assert_array_equal(loaded.encode(CORPUS), tokenizer.encode(CORPUS))


def test_other_text_other_checksum():
    assert checksum(CharTokenizer("abc")) != checksum(CharTokenizer("abd"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"tokenizer": "char"}',
        b'{"tokenizer": "runes", "sha256": "", "state": {}}',
        b'{"tokenizer": "bpe", "sha256": "", "state": {"model": 3}}',
        b'{"tokenizer": "char", "sha256": "", "state": {"characters": 7}}',
        b'{"tokenizer": "word", "sha256": "", "state": {"words": 7}}',
    ],
)
def test_no_tokenizer_in_the_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json holds no tokenizer"):
        load_tokenizer(path)


def test_a_changed_file_is_noticed(tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer("char", CharTokenizer("abc"), path)
    stored = json.loads(path.read_text())
    stored["state"]["characters"] = "abd"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(path)


def test_unknown_word_is_named():
    tokenizer = WordTokenizer.fit(WordTokenizer.Config(), lambda: "a b\n")
    with pytest.raises(OutOfVocabulary, match="'zebra' at place 2 is not among the 3 words"):
        tokenizer.encode("a b zebra a")
    tolerant = WordTokenizer.fit(WordTokenizer.Config(unknown=True), lambda: "a b\n")
    assert tolerant.decode(tolerant.encode("a zebra")) == " a <unk>"


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_half_a_surrogate_pair_is_named(name):
    with pytest.raises(OutOfVocabulary, match=r"'\\ud800' at place 1"):
        fitted(name).encode("t\ud800")


@pytest.mark.parametrize("name", ["byte", "char", "word", "bpe"])
@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_unknown_id_is_named(name, wrong):
    with pytest.raises(OutOfVocabulary, match=rf"token {wrong} at place 1 .* this {name} tokenizer"):
        fitted(name).decode(np.array([0, wrong]))


def test_most_frequent_words_are_kept():
    tokenizer = WordTokenizer.fit(WordTokenizer.Config(max_words=3), lambda: "a a a b b c d\n b a")
    assert set(tokenizer.words) == {"a", "b", "<unk>"}
    assert tokenizer.decode(tokenizer.encode("c b a")) == " <unk> b a"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BpeTokenizer.Config(256), "257 or more"),
        (lambda: WordTokenizer.Config(max_words=-1), "0 .all., or 2 or more"),
        (lambda: WordTokenizer.Config(max_words=1), "0 .all., or 2 or more"),
        (lambda: CharTokenizer.fit(CharTokenizer.Config(), lambda: ""), "at least one character"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_line_ends_at_a_newline_only():
    assert split_words(" a b \n\n c\x0bd\u2028e") == ["a", "b", "<eos>", "<eos>", "c", "d", "e"]


# ---------------------------------------------------------------------------------------------------------------------
# Against the standard data


def test_wikitext2_comes_back_byte_for_byte(data_root):
    text = WikiText2(WikiText2.Config()).documents("valid")[0]
    tokenizer = WordTokenizer.fit(WordTokenizer.Config(), lambda: text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_training_repeats(data_root):
    text = WikiText2(WikiText2.Config()).documents("valid")[0]
    first, second = (BpeTokenizer.fit(BpeTokenizer.Config(2048), lambda: text) for _ in range(2))
    assert checksum(first) == checksum(second)
    assert first.vocabulary == 2048
    ids = first.encode(text)
    assert first.decode(ids) == text
    assert first.byte_lengths[ids].sum() == len(text.encode())
