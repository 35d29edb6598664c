"""The command line: exit codes, one-line errors, and the rows that an evaluation leaves."""

import json
import subprocess
import sys

import pytest
import torch

from zoo import cli, config, registry
from zoo.evaluate import evaluate_run
from zoo.registry import Registry
from zoo.train import Recipe, TrainConfig, train
from zoo.train.loop import changed_mixer

SMALL = ["train.steps=2", "train.batch_size=2", "train.eval_every=0", "train.sample_every=0", "task.context=32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    train(config.build(Recipe, *config.recipe_layers("text/smoke", [*SMALL, "train.ema=0.9"])), folder)
    return folder


def test_the_public_options_are_these():
    """A new option is a decision: it is added here on purpose."""
    options = {
        name: sorted(
            option for action in parser._actions for option in action.option_strings if option.startswith("--")
        )
        for name, parser in cli.build_parser()[1].items()
    }
    assert options == {
        "train": ["--allow-changes", "--help", "--nproc", "--profile", "--resume", "--run"],
        "evaluate": [
            *("--batch-size", "--device", "--dry-run", "--harness", "--help", "--jobs", "--no-ema", "--nproc"),
            *("--only", "--out", "--pretrained", "--split"),
        ],
        "sample": [
            *("--class", "--count", "--csv", "--device", "--frequency", "--given", "--guidance", "--help", "--horizon"),
            *("--id", "--known", "--max-new", "--min-p", "--out", "--plot", "--prompt", "--repetition-penalty"),
            *("--seconds", "--seed", "--stop", "--target", "--temperature", "--time", "--top-k", "--top-p"),
        ],
        "list": ["--help", "--kind", "--pretrained"],
        "publish": ["--about", "--batch-size", "--device", "--help", "--out", "--split", "--table", "--tag"],
        "push": ["--help"],
        "pull": ["--help"],
        "bench": ["--help", "--out", "--peers", "--rounds", "--shapes", "--tune"],
        "doctor": ["--help", "--verbose"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "text/dem"], "did you mean 'text/demo'"),
        (["train", "text/smoke", "train.stps=3"], "did you mean 'steps'"),
        (["train", "text/smoke", "train.steps=abc"], "train.steps = 'abc'"),
        (["train", "text/smoke", "train.device=gpu"], "device = 'gpu'"),
        (["train", "text/smoke", "train.seed=-1"], "seed = -1"),
        (["train", "text/smoke", "train.optimizer.lr=.nan"], "lr = nan"),
        (["train", "text/smoke", "train.optimizer.name=adamww"], "did you mean 'adamw'"),
        (["train", "text/smoke", "model.backbone.kv_heads=-2"], "kv_heads = -2"),
        (["train", "text/smoke", "model.backbone.pattern=gatedfw"], "'gatedfw'"),
        (["evaluate", "/nowhere"], "is no run"),
        (["sample", "/nowhere", "--prompt", "x"], "is no run"),
        (["sample", "text/demo", "--prompt", "x"], "train it first (zoo train text/demo); then runs/text-demo"),
        (["evaluate", "text/demo"], "train it first"),
        (["publish", "nowhere", "--tag", "x", "--about", "card.yaml"], "is no run"),
    ],
)
def test_mendable_errors_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_extra_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["evaluate", str(run), "--harness", "lambada_openai"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zoo evaluate: --harness needs lm-evaluation-harness: pip install")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "usage", "message"),
    [
        (["train", "text/smoke", "--resum"], "train", "unrecognized arguments: --resum; did you mean '--resume'?"),
        (["train", "text/smoke", "--device", "cuda"], "train", "--device cuda; did you mean 'train.device='?"),
        (["train", "text/smoke", "--steps=3"], "train", "--steps=3; did you mean 'train.steps='?"),
        (["sample", "runs/x", "--length", "40"], "sample", "--length 40; did you mean '--max-new'?"),
        (["sample", "runs/x", "--zzz"], "sample", "unrecognized arguments: --zzz\n"),
        (["trian", "text/smoke"], "[-h]", "'trian' is no command; did you mean 'train'?"),
        (["evaluate"], "evaluate", "the following arguments are required: WHAT\n"),
    ],
)
def test_words_that_are_none_of_ours(words, usage, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: zoo {usage}")
    assert message in error


def test_what_is_meant_is_there():
    commands = cli.build_parser()[1]
    meant = {(name, one) for name, words in cli.MEANT.items() for one in words.values()}
    fields = {f"train.{name}=" for name in TrainConfig.__dataclass_fields__}
    assert all(one in fields or one in commands[name].format_help() for name, one in meant)


def test_a_mistyped_run_is_told_without_torch(tmp_path):
    code = "import sys; from zoo import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    for words in (["evaluate", "runs/nope"], ["sample", "runs/nope"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
        assert "is no run" in done.stderr
        assert done.stdout == "False\n"


def test_overrides_before_and_after_options(run, capsys):
    assert cli.main(["train", "text/smoke", *SMALL, "--run", str(run), "--resume", "train.ema=0.9"]) == 0
    assert cli.main(["train", "text/smoke", *SMALL, "--run", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (
        cli.main(["train", "text/smoke", *SMALL, "train.ema=0.9", "train.steps=1", "--run", str(run), "--resume"]) == 2
    )
    assert "past train.steps = 1" in capsys.readouterr().err


def test_the_run_line_names_a_mixer_that_the_model_does_not():
    def told(name: str, *words: str) -> str:
        return changed_mixer(config.build(Recipe, *config.recipe_layers(name, words)).model)

    assert told("text/smoke") == told("text/smoke", "model.backbone.depth=3") == told("image/smoke_classifier") == ""
    assert told("text/smoke", "model.backbone.mixer.name=softmax") == ", mixer softmax"
    assert told("text/smoke", "model.backbone.pattern=swa, softmax") == ", mixer swa + softmax"


def test_an_evaluation_says_how_each_number_came_about(run, capsys):
    assert cli.main(["evaluate", str(run), "--split", "valid", "task.context=16"]) == 0
    assert cli.main(["evaluate", str(run), "--split", "valid", "task.context=16", "--no-ema"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    scores = [row for row in rows if row["name"] == "bits_per_byte"]
    assert [row["weights"] for row in scores] == ["ema", "raw"]
    assert scores[0]["value"] != scores[1]["value"]
    manifest = json.loads((run / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    for row in rows:
        assert row["fingerprint"] == manifest["fingerprint"]
        assert row["sha256"] == manifest["files"]["model.safetensors"]["sha256"]
        assert row["step"] == 2
        assert row["overrides"] == ["task.context=16"]
        assert "context 16" in row["protocol"]
        assert {"seed", "data", "commit", "hardware", "command", "evaluated_with", "split"} <= set(row)
    assert {row["kind"] for row in rows} == {"metric", "baseline"}


def test_evaluation_has_the_precision_of_the_validation_while_training(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i}\n" for i in range(300)))
    words = [*SMALL, "train.precision=bf16", "train.eval_every=2", "train.eval_batches=0"]
    words += ["task.dataset.name=text/folder", f"task.dataset.path={tmp_path / 'text.txt'}"]
    trained = train(config.build(Recipe, *config.recipe_layers("text/smoke", words)), tmp_path / "run")
    same, wider = (
        evaluate_run(tmp_path / "run", split="valid", batch_size=2, device="cpu", overrides=overrides)
        for overrides in ((), ("train.precision=fp32",))
    )
    assert same.values["loss"] == trained.metrics["valid/loss"] != wider.values["loss"]
    assert ", bf16, " in same.title
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [row["precision"] for row in rows if row["name"] == "loss"] == ["bf16", "fp32"]


def test_sample_prints_prompt_and_continuation(run, capsys):
    assert cli.main(["sample", str(run), "--prompt", "def ", "--max-new", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert cli.main(["sample", str(run), "--prompt", "a", "--prompt", "bc", "--max-new", "3", "--stop", "\n"]) == 0
    assert "--- 2\nbc" in capsys.readouterr().out
    assert cli.main(["sample", str(run), "--prompt", ""]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_list_and_doctor(capsys):
    assert cli.main(["list", "text_gated*"]) == 0
    assert "text_gatedfwa_125m" in capsys.readouterr().out.splitlines()
    assert cli.main(["list", "nothing*"]) == 1
    assert cli.main(["doctor", "--verbose"]) == 0
    report = capsys.readouterr().out
    for word in ("torch", "window_attention", "ring_attention", "linear_cross_entropy", "reference", "ZOO_DATA"):
        assert word in report


def test_an_empty_list_of_weights_says_what_makes_one(capsys, monkeypatch):
    from zoo import weights

    monkeypatch.setattr(weights, "weights", Registry("weights"))
    assert cli.main(["list", "--pretrained"]) == 0
    said = capsys.readouterr()
    assert not said.out  # names alone go there
    assert said.err == "none published here yet; zoo publish makes one: docs/weights.md\n"
    assert cli.main(["list", "text*", "--pretrained"]) == 1


def test_doctor_is_brief_where_all_operators_take_the_same(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ZOO_BACKEND", raising=False)

    def said(*words: str) -> str:
        assert cli.main(["doctor", *words]) == 0
        return capsys.readouterr().out

    assert "every operator: reference, for there is no CUDA device" in said()
    assert "ring_attention" not in said()
    assert said("--verbose").count("bfloat16, float16, float32; ") > 7  # one line an operator, not one a dtype
    monkeypatch.setenv("ZOO_BACKEND", "triton")
    assert "ZOO_BACKEND=triton, but" in said()


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(_):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "run_list", broken)
    with pytest.raises(KeyError):
        cli.main(["list"])


def test_a_registry_that_could_not_load_says_so_again():
    def fail(_):
        raise ImportError("a broken domain")

    broken = Registry("task", fail)
    for _ in range(2):
        with pytest.raises(ImportError, match="a broken domain"):
            broken.get("text")


def test_gates_and_embeddings_go_to_adamw_under_muon():
    from zoo.train.optim import parameter_groups

    model = registry.models.get("text_gatedfwa_1m")().build()
    fallback = {id(p) for group in parameter_groups(model, 0.1) if group["use_fallback"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        gate_or_embedding = any(part in name for part in ("gate", "shift", "embed", "norm"))
        assert (id(parameter) in fallback) == gate_or_embedding, name


def test_a_state_and_packed_documents_exclude_each_other():
    from zoo.model import Context

    model = registry.models.get("text_gatedfwa_1m")().build()
    cache = model.backbone.init_cache(1, 20)
    with pytest.raises(ValueError, match="cu_seqlens and a cache"):
        model.backbone(torch.randn(1, 12, 128), Context(cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32)), cache)
