"""The text task: streams, prompts, metrics against brute force, generation, every size and every recipe."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo import config, registry
from zoo.config import build, list_recipes, recipe_layers
from zoo.generation import Sampling, generate
from zoo.model import Batch
from zoo.pipelines import Pipeline
from zoo.task import run_metrics
from zoo.train import Recipe


@pytest.fixture
def folder(tmp_path):
    text = "".join(f"line {i} of a small text about numbers and {i * i}\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path / "text.txt"


def text_task(folder, **fields):
    entry = registry.tasks.get("text")
    node = {"dataset": {"name": "text/folder", "path": str(folder)}, "context": 32}
    return entry(build(entry.Config, node, fields))


def small_model(task, **fields):
    torch.manual_seed(0)
    size = registry.models.get("text_gatedfwa_1m")()
    small = {"backbone": {"width": 32, "depth": 2, "heads": 2, "mixer": {"window": 8}}}
    return task.model_config(build(type(size), size, small, fields)).build()


@pytest.mark.parametrize("stride", [0, 1, 20, 32])
def test_every_token_is_scored_once_and_the_arithmetic_is_right(folder, stride):
    task = text_task(folder, stride=stride)
    model = small_model(task)
    tokens = torch.from_numpy(task.tokens("valid")).long()
    values = run_metrics(model, task.metrics("valid"), task.stream("valid", batch_size=3))

    step = stride or 16
    nats, counted = 0.0, 0
    for position in range(1, len(tokens)):  # each token alone, from the row that scores it
        row = max(0, -(-(position - 32) // step))
        end = min(32 + row * step, len(tokens) - 1)
        start = max(0, end - 32)
        with torch.no_grad():
            h, _ = model.head.embed(tokens[None, start:position], Batch(None).ctx)
            h, _ = model.backbone(h, Batch(None).ctx)
            nats += F.cross_entropy(model.head.logits(h[:, -1], None), tokens[position : position + 1]).item()
        counted += 1
    assert values["tokens"] == counted == len(tokens) - 1
    assert values["loss"] == pytest.approx(nats / counted, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(nats / counted), rel=1e-4)
    text = task.text("valid")
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(text.encode()) - 1), rel=1e-5)
    words = len(text.split()) + text.count("\n") - 1
    assert values["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)


@pytest.mark.parametrize("rows", ["windows", "crops", "documents"])
def test_training_rows(folder, rows):
    task = text_task(folder, rows=rows)
    batch = next(iter(task.stream("train", batch_size=4)))
    assert batch.inputs.numel() == 4 * 32
    assert batch.inputs.shape == batch.targets.shape
    inner = batch.targets[:, :-1]
    assert torch.equal(inner[inner >= 0], batch.inputs[:, 1:][inner >= 0])
    output = small_model(task)(batch)
    assert output.count == (batch.targets >= 0).sum()
    assert output.loss.item() == pytest.approx(math.log(256), rel=0.1)


def test_a_prompt_of_several_lengths_gives_what_each_gives_alone(folder):
    task = text_task(folder)
    model = small_model(task)
    prompts = ["line", "a much longer prompt than the window", "x"]
    greedy = Sampling(temperature=0)
    together = generate(model, task.prompt(prompts), max_new=12, sampling=greedy)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, task.prompt(prompt), max_new=12, sampling=greedy, chunk=5)
        assert row.tolist() == alone[0].tolist()


@torch.no_grad()
def test_generation_is_the_full_forward_repeated(folder):
    task = text_task(folder)
    model = small_model(task).eval()
    tokens = task.prompt("line 1 of ").inputs
    drawn = generate(model, tokens, max_new=20, sampling=Sampling(temperature=0, repetition_penalty=1.3))
    for _ in range(20):
        h, _ = model.head.embed(tokens, Batch(None).ctx)
        h, _ = model.backbone(h, Batch(None).ctx)
        logits = model.head.logits(h[:, -1], None)
        seen = torch.zeros_like(logits).scatter_(1, tokens, 1.0)
        logits = torch.where(seen > 0, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert drawn[0].tolist() == tokens[0, -20:].tolist()


def test_streaming_stop_strings_and_seeds(folder):
    task = text_task(folder)
    pipe = Pipeline(small_model(task), task)
    whole = pipe.sample("line", max_new=40, seed=3)
    assert "".join(pipe.stream("line", max_new=40, seed=3)) == whole
    assert pipe.sample("line", max_new=40, seed=3) == whole != pipe.sample("line", max_new=40, seed=4)
    stop = whole[10:12]
    expected = whole[: whole.index(stop)]
    assert pipe.sample("line", max_new=40, seed=3, stop=[stop]) == expected
    assert "".join(pipe.stream("line", max_new=40, seed=3, stop=[stop])) == expected
    assert pipe.sample(["line", "x"], max_new=4, seed=3)[0] != ""


def test_a_stop_string_of_several_bytes_is_held_back_whole(folder, monkeypatch):
    task = text_task(folder)
    pipe = Pipeline(small_model(task), task)
    pieces = [torch.tensor([[byte]]) for byte in "abé!".encode()]
    monkeypatch.setattr("zoo.pipelines.generate", lambda *_, **__: iter(pieces))
    assert "".join(pipe.stream("x", max_new=5, stop=["bé"])) == "a"
    assert "".join(pipe.stream("x", max_new=5, stop=["bx"])) == "abé!"


def fed(pipe, monkeypatch, tokens, **options):
    monkeypatch.setattr("zoo.pipelines.generate", lambda *_, **__: iter([torch.tensor([[t]]) for t in tokens]))
    return "".join(pipe.stream("words", **options)), pipe.sample("words", **options)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", {"name": "bpe", "size": 300}])
def test_pieces_of_a_stream_are_the_whole(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "text.txt").write_text("süße 四つの 🙂🙃 words and\nmore words of it\n" * 20, encoding="utf-8")
    task = text_task(tmp_path, tokenizer=tokenizer, context=4)
    pipe = Pipeline(small_model(task), task)
    tokens = [int(t) for t in task.tokens("train")[:150]]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(task.tokenizer.vocabulary, (300,), generator=generator).tolist()  # bytes: mostly no UTF-8
    for drawn in (tokens, noise, [*tokens[:20], *[tokens[5]] * 100, *tokens]):
        whole = task.artefact(torch.tensor(drawn))
        streamed, sampled = fed(pipe, monkeypatch, drawn)
        assert streamed == sampled == whole
        stops = [whole[40:43], whole[41:42], "never"]
        streamed, sampled = fed(pipe, monkeypatch, drawn, stop=stops)
        assert streamed == sampled
        assert whole.startswith(streamed)
        assert not any(stop in streamed for stop in stops)


@pytest.mark.parametrize("drawn", [list(b"plain text ") * 40, [0x80] * 440, [0xE2, 0x82] * 220])
def test_a_stream_decodes_no_token_again_and_again(folder, monkeypatch, drawn):
    task = text_task(folder)
    pipe, decoded, artefact = Pipeline(small_model(task), task), [], task.artefact
    monkeypatch.setattr(task, "artefact", lambda row: decoded.append(len(row)) or artefact(row))
    assert fed(pipe, monkeypatch, drawn, stop=["#"])[0] == artefact(torch.tensor(drawn))
    assert max(decoded) < 100  # whatever is drawn: at each step as much work as at the one before


@pytest.mark.parametrize("prompt", ["", [], ["a", ""]])
def test_an_empty_prompt_is_refused(folder, prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        text_task(folder).prompt(prompt)


def test_last_word_accuracy(data_root, folder):
    task = text_task(folder, dataset="text/lambada", context=64)
    stream = task.stream("test", batch_size=8)
    batch = next(iter(stream))
    passage = task.corpus.documents("test")[0]
    scored = batch.targets[0][batch.targets[0] >= 0]
    assert task.artefact(scored) == " signs"
    assert passage.endswith(" signs")
    metric = task.metrics("test")["last_word"]
    metric.update(small_model(task), batch)
    scores = metric.compute()
    assert scores["last_word_accuracy"] == 0.0
    assert scores["passages"] == 8


def test_media_writes_samples(folder):
    task = text_task(folder, prompts=["line "], sample_tokens=10)
    media = task.media(small_model(task), next(iter(task.stream("valid", batch_size=1))))
    assert media.text["sample/0"].startswith("line ")


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in registry.models.names("text_*") if not name.endswith("125m")])
def test_every_size_takes_a_step(name):
    model = zoo.create_model(name, backbone={"depth": 1})
    tokens = torch.randint(0, 256, (1, 9))
    model(Batch(tokens[:, :-1], tokens[:, 1:])).loss_sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_125m_class_has_its_shape():
    with torch.device("meta"):
        model = zoo.create_model("text_gatedfwa_125m")
    assert 123e6 < model.parameter_count() < 127e6


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_fits_its_schema(name):
    recipe = build(Recipe, *recipe_layers(name))
    assert recipe.task is not None
    assert recipe.model is not None
    assert build(Recipe, config.to_dict(recipe)) == recipe
