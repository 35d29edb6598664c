"""scripts/series_peers.py: what counts as the same run, and what its table brings together."""

import importlib.util
from argparse import Namespace
from pathlib import Path

FILE = Path(__file__).parents[3] / "scripts" / "series_peers.py"
SPEC = importlib.util.spec_from_file_location("series_peers", FILE)
peers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(peers)


def asked(**changes):
    shared = {"recipe": "series/etth1", "name": "", "size": "100k", "seeds": [0, 1], "mixers": ["swa"]}
    return Namespace(**{**shared, "word": [], "evaluate": [], **changes})


def rows(args, mse):
    return [job | {"values": {"mse": mse}, "parameters": 7} for job in peers.missing(args, [])]


def test_only_the_same_run_is_skipped():
    known = rows(asked(word=["task.stride=8"]), 0.5)
    assert peers.missing(asked(word=["task.stride=8"]), known) == []
    assert [job["seed"] for job in peers.missing(asked(word=["task.stride=8"], seeds=[0, 1, 2]), known)] == [2]
    for changes in ({"size": "1m"}, {"evaluate": ["task.stride=1"]}, {"name": "a"}, {"mixers": ["softmax"]}):
        assert len(peers.missing(asked(word=["task.stride=8"], **changes), known)) == 2, changes
    named = rows(asked(name="a", word=["task.stride=8"]), 0.5)
    assert len(peers.missing(asked(name="a", word=["task.stride=4"]), named)) == 2
    failed = [row | {"error": "out of memory"} for row in known]
    assert len(peers.missing(asked(word=["task.stride=8"]), failed)) == 2


def test_the_table_averages_over_seeds_alone():
    small, large = rows(asked(), 0.5), rows(asked(size="1m"), 0.25)
    scored = rows(asked(evaluate=["task.stride=1"]), 0.125)
    assert peers.table([*small, *large, *scored]).splitlines() == [
        "swa (2 seeds, 7): mse 0.5000 ± 0.0000  100k",
        "swa (2 seeds, 7): mse 0.2500 ± 0.0000  1m",
        "swa (2 seeds, 7): mse 0.1250 ± 0.0000  100k --evaluate task.stride=1",
    ]
