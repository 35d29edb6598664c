"""The lm-evaluation-harness adapter: its scores against brute force; with the harness itself where it is installed."""

import json

import pytest
import torch
import torch.nn.functional as F

from zoo import config, registry
from zoo.evaluate.harness import context_of, continued, loglikelihoods, run_harness, whole_text
from zoo.model import Batch
from zoo.pipelines import Pipeline
from zoo.train import Recipe, train

CONTEXT = 16


@pytest.fixture
def pipe(tmp_path):
    (tmp_path / "text.txt").write_text("a small text about numbers and names\n" * 50)
    entry = registry.tasks.get("text")
    task = entry(
        config.build(entry.Config, {"dataset": {"name": "text/folder", "path": str(tmp_path)}, "context": CONTEXT})
    )
    torch.manual_seed(0)
    size = registry.models.get("text_gatedfwa_1m")()
    small = {"backbone": {"width": 32, "depth": 1, "heads": 2, "mixer": {"window": 8}}}
    return Pipeline(task.model_config(config.build(type(size), size, small)).build().eval(), task)


@torch.no_grad()
def brute_force(pipe, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token."""
    begun, added = list(context.encode()), list(continuation.encode())
    nats, greedy = 0.0, True
    for i, token in enumerate(added):
        seen = torch.tensor([(begun + added[:i])[-CONTEXT:]])
        h, _ = pipe.model.backbone(pipe.model.head.embed(seen, Batch(None).ctx)[0], Batch(None).ctx)
        logits = pipe.model.head.logits(h[:, -1], None)
        nats -= F.cross_entropy(logits, torch.tensor([token])).item()
        greedy &= int(logits.argmax()) == token
    return nats, greedy


def test_loglikelihoods_in_any_batch(pipe):
    pairs = [("a small", " text"), ("", "x"), ("a ", "b"), ("names and", " numbers"), ("e", "e")]
    greedy = pipe.sample("names", max_new=3, sampling=__import__("zoo").generation.Sampling(temperature=0))
    pairs.append(("names", greedy))
    for size in (1, 4):
        found = loglikelihoods(pipe, pairs, size)
        for (context, continuation), (nats, likeliest) in zip(pairs, found, strict=True):
            want = brute_force(pipe, context or "\n", continuation)
            if context.endswith(" "):  # the space is scored
                want = brute_force(pipe, context.rstrip(), " " + continuation)
            assert nats == pytest.approx(want[0], abs=1e-3)
            assert likeliest == want[1]
    assert found[-1][1]


def test_long_contexts_are_cut_on_the_left(pipe):
    context = "numbers and names about a small text"
    ((nats, _),) = loglikelihoods(pipe, [(context, "!")], 1)
    assert nats == pytest.approx(brute_force(pipe, context, "!")[0], abs=1e-3)


def test_whole_text_scores_every_token_once(pipe):
    text = "a small text about numbers and names"
    tokens = list(("\n" + text).encode())
    want = 0.0
    for begin in range(0, len(tokens) - 1, CONTEXT):  # rows one after another; the last one ends with the text
        end = min(begin + CONTEXT, len(tokens) - 1)
        start = max(0, end - CONTEXT)
        for i in range(begin, end):
            with torch.no_grad():
                seen = torch.tensor([tokens[start : i + 1]])
                h, _ = pipe.model.backbone(pipe.model.head.embed(seen, Batch(None).ctx)[0], Batch(None).ctx)
                logits = pipe.model.head.logits(h[:, -1], None)
            want -= F.cross_entropy(logits, torch.tensor([tokens[i + 1]])).item()
    assert whole_text(pipe, text, 2) == pytest.approx(want, abs=1e-3)
    assert whole_text(pipe, "", 2) == 0.0
    assert context_of(pipe) == CONTEXT


def test_continuing_stops_where_it_is_told(pipe):
    whole = continued(pipe, "names", {"until": [], "max_gen_toks": 12})
    stop = whole[3:5]
    assert continued(pipe, "names", {"until": [stop], "max_gen_toks": 12}) == whole[: whole.index(stop)]


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gatedfwa-zoo\[eval\]'"):
        run_harness(tmp_path, ["lambada_openai"])


TASK = """
task: zoo_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_in_the_harness_itself(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    words = ["train.steps=2", "train.eval_every=0", "train.sample_every=0", "task.context=32"]
    run = train(config.build(Recipe, *config.recipe_layers("text/smoke", words)), tmp_path / "run").run
    rows = [{"question": f"is {i} even? ", "answer": i % 2} for i in range(6)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "zoo_choice.yaml").write_text(TASK % (tmp_path / "data.json"))
    manager = TaskManager(include_path=str(tmp_path))
    assert "zoo_choice" in manager.all_tasks
    real = lm_eval.simple_evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "simple_evaluate", lambda **words: real(task_manager=manager, **words))
        scores = run_harness(run, ["zoo_choice"])
    assert 0 <= scores.values["zoo_choice/acc"] <= 1
    (row,) = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert row["kind"] == "harness"
    assert {"fingerprint", "commit", "hardware", "harness", "shots"} <= row.keys()
