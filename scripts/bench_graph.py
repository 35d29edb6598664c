"""Training steps a second with train.graph off and on, of the small recipes, on a CUDA device.

    python scripts/bench_graph.py                                       all of them
    python scripts/bench_graph.py series/etth1 recall/mqar_b --steps 300

Needs the recipes' data ($ZOO_DATA). recall/* run as a sweep of four replicas. Every run is a process of its own. Prints
one JSON object a line: milliseconds a step, the median over the second half of the steps, and the last loss.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = ("series/etth1", "recall/mqar_b", "text/tinyshakespeare", "image/mnist")
RATES = (1e-3, 3.16e-3, 1e-2, 3.16e-2)


def run(name: str, graph: bool, steps: int) -> dict[str, Any]:
    import torch

    from zoo import config
    from zoo.train import Recipe, Replica, log, sweep, train

    words = [f"train.graph={str(graph).lower()}", f"train.steps={steps}", "train.log_every=25", "train.device=cuda"]
    words += ["train.eval_every=0", "train.sample_every=0", "train.save_every=0", "train.stop_when=''"]
    recipe = config.build(Recipe, *config.recipe_layers(name, words))
    times: list[float] = []
    advance = log.RunLog.advance

    def timed(self: Any, step: int) -> float:
        if step % 25 == 0:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
        return advance(self, step)

    log.RunLog.advance = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("recall/"):
            sweep(recipe, Path(folder), [Replica(lr, 0) for lr in RATES])
        else:
            train(recipe, Path(folder))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    each = [1000 * (b - a) / 25 for a, b in zip(times, times[1:], strict=False)]
    ms = statistics.median(each[len(each) // 2 :])
    return {"recipe": name, "graph": graph, "ms": round(ms, 3), "steps_per_second": round(1000 / ms, 1)} | {
        "loss": next(row["train/loss"] for row in reversed(rows) if "train/loss" in row),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=150, help="seconds for one run")
    parser.add_argument("--one", choices=["true", "false"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.recipes[0], options.one == "true", options.steps)), flush=True)
        return
    for name in options.recipes:
        for on in ("false", "true"):
            words = [sys.executable, __file__, name, "--one", on, "--steps", str(options.steps)]
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=options.limit)
                error = f"exit code {done.returncode}: {done.stderr[-800:]}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                error = f"no end after {options.limit} s"
            failed = json.dumps({"recipe": name, "graph": on == "true", "error": error})
            print(failed if error else done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
