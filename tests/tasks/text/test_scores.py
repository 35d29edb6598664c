"""What the text task scores, for each tokenizer, rank and split; its errors; a step of every recipe."""

import gzip
import itertools
import json
import math
import subprocess

import numpy as np
import pytest
import torch

from tasks.text.metrics import Likelihood, TextSize, gzip_bits_per_byte, last_word
from tasks.text.task import TextTask
from tasks.text.tokenizers import ByteTokenizer, OutOfVocabulary
from zoo import config as configs
from zoo.config import ConfigError
from zoo.model import Context, ModelConfig
from zoo.pipelines import pipeline
from zoo.registry import models
from zoo.task import run_metrics
from zoo.train import Recipe, train

TEXT = {
    "train": "the cat  sat on the mat — naïve\nthe dog sat\n" * 20,
    "valid": "the dog sat on the  naïve cat —\n\nthe mat sat on\n" * 3 + "the cat",
    "test": "the mat\n" * 9,
}


@pytest.fixture
def corpus(tmp_path):
    for split, text in TEXT.items():
        (tmp_path / f"{split}.txt").write_bytes(text.encode())
    return tmp_path


def make_task(corpus, tokenizer="byte", **fields):
    size = {"size": 300} if tokenizer == "bpe" else {}
    words = {"unknown": True} if tokenizer == "word" else {}
    node = {"name": tokenizer, **size, **words}
    dataset = {"name": "text/folder", "path": str(corpus)}
    return TextTask(configs.build(TextTask.Config, {"dataset": dataset, "tokenizer": node, "context": 16, **fields}))


def make_model(task, mixer="gatedfwa"):
    base = models.get(f"text_{mixer}_1m")()
    small = {"backbone": {"width": 16, "depth": 2, "heads": 2, "positions": "none"}}
    torch.manual_seed(0)
    model = task.model_config(configs.build(ModelConfig, base, small)).build().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def brute_force(model, tokens, context, stride):
    """Nats of each token but the first, one forward pass a token, with the context that the protocol gives it."""
    nats = []
    for place in range(1, len(tokens)):
        row = 0 if place <= context else math.ceil((place - context) / stride)
        end = min(context + row * stride, len(tokens) - 1)
        before = torch.from_numpy(tokens[max(0, end - context) : place]).long()[None]
        h, _ = model.backbone(model.head.embed(before, Context())[0], Context())
        nats.append(-model.head.logits(h[:, -1], None).double().log_softmax(-1)[0, int(tokens[place])].item())
    return np.array(nats)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "bpe"])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_token_is_scored_once(corpus, tokenizer, stride):
    task = make_task(corpus, tokenizer, stride=stride)
    tokens = task.tokens("valid")
    seen = []
    for rank in range(3):
        for batch in task.stream("valid", batch_size=2, rank=rank, world=3):
            assert batch.inputs.shape[1] <= 16
            assert ((batch.targets[:, :-1] < 0) | (batch.inputs[:, 1:] == batch.targets[:, :-1])).all()
            seen += batch.targets[batch.targets >= 0].tolist()
    assert sorted(seen) == sorted(tokens[1:].tolist())


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "bpe"])
def test_numbers_against_brute_force(corpus, tokenizer):
    task = make_task(corpus, tokenizer, stride=5)
    model = make_model(task)
    tokens, text = task.tokens("valid"), task.text("valid")
    nats = brute_force(model, tokens, 16, 5).sum()
    got = run_metrics(model, task.metrics("valid"), task.stream("valid", batch_size=3))
    first = len(task.tokenizer.decode(tokens[:1]).encode())  # the first token has no context
    words = len(text.replace("\n", " <eos> ").split()) - 1
    assert got["tokens"] == len(tokens) - 1
    assert got["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    assert got["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(text.encode()) - first), rel=1e-5)


def test_a_longer_stride_only_shortens_contexts(corpus):
    task = make_task(corpus)
    protocol = task.describe("valid")
    assert "context 16, stride 8" in protocol
    assert "9 to 16 tokens before" in protocol


@pytest.mark.parametrize("tokenizer", ["byte", "word"])
def test_numbers_do_not_depend_on_batches_or_ranks(corpus, tokenizer):
    task = make_task(corpus, tokenizer, stride=5)
    model = make_model(task)
    whole = run_metrics(model, task.metrics("valid"), task.stream("valid", batch_size=100))
    parts = [task.metrics("valid")["likelihood"] for _ in range(3)]
    for rank, metric in enumerate(parts):
        for batch in task.stream("valid", batch_size=2, rank=rank, world=3):
            metric.update(model, batch)

    class Ranks:
        """The sum over ranks, of whichever field is asked for."""

        def __init__(self):
            self.fields = itertools.cycle(("nats", "scored", "bytes"))
            self.sums = {f: sum(getattr(m, f) for m in parts) for f in ("nats", "scored", "bytes")}

        def sum(self, tensor):
            return self.sums[next(self.fields)]

    ranks = Ranks()
    for metric in parts:
        metric.reduce(ranks)
        assert metric.compute() == pytest.approx(whole, rel=1e-6)


def test_part_of_a_text_has_its_own_bytes(corpus):
    task = make_task(corpus, "char", stride=16)
    model = make_model(task)
    metric = task.metrics("valid")["likelihood"]
    batch = next(iter(task.stream("valid", batch_size=2)))
    metric.update(model, batch)
    text = task.text("valid")[1:33]
    nats = brute_force(model, task.tokens("valid")[:33], 16, 16).sum()
    assert metric.compute()["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_nothing_scored_is_no_number():
    metric = Likelihood(TextSize(0, 0, 0), np.ones(4, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert math.isnan(metric.compute()["bits_per_byte"])


def test_gzip_is_that_of_the_command(corpus):
    data = (corpus / "train.txt").read_bytes()
    shown = subprocess.run(["gzip", "-9", "-n", "-c"], input=data, capture_output=True, check=True).stdout
    assert gzip.decompress(shown) == data
    assert gzip_bits_per_byte(data) == pytest.approx(8 * len(shown) / len(data), rel=0.01)
    assert make_task(corpus).baselines("train") == {"gzip_9_bits_per_byte": gzip_bits_per_byte(data)}


def test_text_of_one_token(corpus):
    (corpus / "test.txt").write_text("a")
    with pytest.raises(ValueError, match="nothing to score"):
        make_task(corpus).stream("test", batch_size=1)


def test_unknown_character_of_a_split_is_named(corpus):
    (corpus / "test.txt").write_text("the z")
    with pytest.raises(OutOfVocabulary, match=r"split test of text/folder: character 'z' at place 4"):
        make_task(corpus, "char").stream("test", batch_size=1)


# ---------------------------------------------------------------------------------------------------------------------
# LAMBADA


def test_last_word():
    assert last_word("as it was, the old sign\n") == ("as it was, the old", " sign")


def lambada(context=512):
    layers = {"dataset": {"name": "text/lambada"}, "tokenizer": {"name": "byte"}, "context": context}
    task = TextTask(configs.build(TextTask.Config, layers))
    task.tokenizer = ByteTokenizer()  # as from a run's assets
    return task


def test_lambada_scores_last_words(data_root):
    task = lambada()
    passages = task.corpus.documents("test")
    batches = list(itertools.islice(task.stream("test", batch_size=4), 3))
    for n, batch in enumerate(batches):
        for row in range(4):
            scored = batch.targets[row][batch.targets[row] >= 0]
            assert task.artefact(scored) == last_word(passages[4 * n + row])[1]

    model = make_model(task, "softmax")
    got = run_metrics(model, task.metrics("test"), task.stream("test", batch_size=4), progress=first(3))
    assert got["passages"] == 12
    nats, right = 0.0, 0
    for passage in passages[:12]:
        head, word = (torch.from_numpy(task.tokenizer.encode(part)).long() for part in last_word(passage))
        whole = torch.cat((head, word))[-513:]
        with torch.no_grad():
            h, _ = model.backbone(model.head.embed(whole[None, :-1], Context())[0], Context())
            logits = model.head.logits(h[0, -len(word) :], None)
        nats -= logits.double().log_softmax(-1).gather(1, word[:, None]).sum().item()
        right += int((logits.argmax(-1) == word).all())
    assert got["last_word_accuracy"] == pytest.approx(right / 12)
    assert math.log(got["last_word_perplexity"]) == pytest.approx(nats / 12, rel=1e-5)


def first(count):
    return lambda stream: itertools.islice(stream, count)


def test_lambada_word_longer_than_the_context(data_root):
    batch = next(iter(lambada(context=3).stream("test", batch_size=2)))
    assert batch.inputs.shape == (2, 3)
    assert (batch.targets >= 0).any(dim=1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Training rows, prompts, text


@pytest.mark.parametrize("rows", ["windows", "crops", "documents"])
def test_training_rows(corpus, rows):
    task = make_task(corpus, rows=rows)
    text = task.tokens("train").astype(np.uint8).tobytes()
    batches = [list(itertools.islice(task.stream("train", batch_size=2, seed=seed), 3)) for seed in (0, 0, 1)]
    for batch in batches[0]:
        for row, targets in zip(batch.inputs.view(-1, 16), batch.targets.view(-1, 16), strict=True):
            if rows != "documents":  # those may end and begin again within a row
                assert bytes(row.tolist()) + bytes(targets[-1:].tolist()) in text
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches[0], batches[1], strict=True))
    assert rows == "documents" or not all(
        torch.equal(a.inputs, b.inputs) for a, b in zip(batches[0], batches[2], strict=True)
    )
    assert (batches[0][0].ctx.cu_seqlens is not None) == (rows == "documents")


def test_prompts(corpus):
    task = make_task(corpus)
    one = task.prompt("the")
    assert one.inputs.tolist() == [list(b"the")]
    several = task.prompt(["the mat", "ï"])
    assert several.inputs.shape == (2, 7)
    assert several.ctx.lengths.tolist() == [7, 2]
    assert task.artefact(several.inputs[1][:2]) == "ï"


def test_prompts_without_a_token_are_refused(corpus):
    with pytest.raises(ValueError, match="a prompt is empty: '  ' holds no token"):
        make_task(corpus, "word").prompt(["the", "  "])


@pytest.mark.parametrize("prompt", [3, [b"the"], [None]])
def test_prompts_are_texts(corpus, prompt):
    with pytest.raises(
        TypeError, match="a prompt is a text, not" if isinstance(prompt, list) else "not iterable|is a text"
    ):
        make_task(corpus).prompt(prompt)


def test_prompt_outside_the_vocabulary(corpus):
    with pytest.raises(OutOfVocabulary, match=r"'z' at place 1 .*char tokenizer"):
        make_task(corpus, "char").prompt("az")


@pytest.mark.parametrize("wrong", [{"context": 0}, {"stride": 17}, {"stride": -1}, {"sample_tokens": 0}])
def test_bad_settings(corpus, wrong):
    with pytest.raises(ConfigError, match="it takes"):
        make_task(corpus, **wrong)


def test_assets_need_no_data(corpus, tmp_path):
    task = make_task(corpus, "char")
    task.save_assets(tmp_path)
    config = configs.build(TextTask.Config, configs.to_dict(task.config), {"dataset": {"path": "/nowhere"}})
    again = TextTask(config, tmp_path)
    assert again.prompt("the").inputs.tolist() == task.prompt("the").inputs.tolist()
    assert again.artefact(again.prompt("mat").inputs[0]) == "mat"
    assert again.model_config(ModelConfig(head=models.get("text_swa_1m")().head)).head.config.vocabulary == len(
        task.tokenizer.characters
    )


def test_provenance_is_plain_and_names_the_tokenizer(corpus):
    provenance = make_task(corpus, "char").provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["tokenizer"]["name"] == "char"
    assert len(provenance["tokenizer"]["sha256"]) == 64


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

RECIPES = [name for name in configs.list_recipes() if name.startswith("text/")]
TINY = ["train.steps=1", "train.batch_size=1", "train.precision=fp32", "train.compile=false", "train.eval_batches=1"]
TINY += ["train.device=cpu", "task.context=32", "task.stride=16", "task.sample_tokens=2"]
TINY += ["model.backbone.width=32", "model.backbone.depth=1", "model.backbone.heads=2"]


def one_step(name, run):
    recipe = configs.build(Recipe, *configs.recipe_layers(name, TINY))
    result = train(recipe, run)
    assert math.isfinite(result.metrics["valid/loss"])
    assert result.metrics["valid/bits_per_byte"] > 1


@pytest.mark.parametrize("name", [name for name in RECIPES if name in ("text/demo", "text/smoke")])
def test_one_step_of_the_demo(name, tmp_path):
    one_step(name, tmp_path)


@pytest.mark.parametrize("name", ["text/tinyshakespeare", "text/gutenberg", "text/wikitext2"])
def test_one_step(name, tmp_path, data_root):
    one_step(name, tmp_path)


@pytest.mark.slow
def test_one_step_with_byte_pairs(tmp_path, data_root):  # learning the pairs takes twenty seconds
    one_step("text/wikitext2_bpe", tmp_path)


def test_tinyshakespeare_sizes():
    sizes = []
    for mixer in ("gatedfwa", "softmax", "swa"):
        layers = configs.recipe_layers("text/tinyshakespeare", [f"model=text_{mixer}_10m"])
        config = configs.build(Recipe, *layers).model.config
        model = configs.build(ModelConfig, config, {"head": {"vocabulary": 65}}).build()
        sizes.append(model.parameter_count())
    assert max(sizes) <= 10_700_000
    assert max(sizes) < 1.01 * min(sizes)


def test_smoke_run_is_sampled_from(tmp_path):
    recipe = configs.build(Recipe, *configs.recipe_layers("text/smoke", ["train.steps=4", "train.device=cpu"]))
    train(recipe, tmp_path)
    drawn = pipeline(tmp_path, device="cpu").sample(["def ", "import torch\n"], max_new=6, seed=0)
    assert len(drawn) == 2
    assert all(isinstance(text, str) for text in drawn)
