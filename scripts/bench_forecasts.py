"""Forecasts a second: series models of several mixers, from a history of so many values to a horizon.

    python scripts/bench_forecasts.py                              on this machine, contexts 512 and 8192
    python scripts/bench_forecasts.py --rows 1 1024 --horizon 720  one JSON row a measurement

A forecast is one series' mean and quantiles, history in, horizon out: prefill, and the roll on the state. Weights and
data are random: speed does not depend on them. Calls are eager, so small ones wait for Python. A round is one whole
batch of each mixer in turn, so that what else the machine does meets all alike; a row has the median of `--rounds` of
them after two that are not counted, and the slowest and the fastest.
"""

import argparse
import json
import statistics
import time

import torch

import zoo
from tasks.series.outputs import nine
from tasks.series.rolling import roll
from zoo.model import Batch, Model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", default=["gatedfwa", "swa", "softmax", "gatedfwa_nsa"])
    parser.add_argument("--size", default="100k")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192], help="values of a history")
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--predict", type=int, default=96)
    parser.add_argument("--rows", type=int, nargs="+", help="series at once (default: 1 and 1024 on a GPU, 1 and 64)")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


def build(mixer: str, context: int, args: argparse.Namespace, device: torch.device) -> Model:
    head = {"patch": args.patch, "predict": args.predict, "prefix": context // args.patch, "highway": 512}
    model = zoo.create_model(f"series_{mixer}_{args.size}", head=head)
    assert isinstance(model, Model)
    return model.to(device).eval()


def seconds(model: Model, batch: Batch, args: argparse.Namespace) -> float:
    began = time.perf_counter()
    forecast = roll(model, batch, args.horizon, levels=nine(), mode="point")
    float(forecast.mean[0, 0, -1])  # waits for the device
    return time.perf_counter() - began


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for context in args.contexts:
        if context % args.patch or context < 512:
            raise SystemExit(f"--contexts {context}: they take multiples of --patch = {args.patch}, 512 or more")
        models = {mixer: build(mixer, context, args, device) for mixer in args.mixers}
        for rows in args.rows or ([1, 1024] if device.type == "cuda" else [1, 64]):
            batch = Batch(torch.randn(rows, context // args.patch, 1, args.patch, device=device))
            rounds = [[seconds(model, batch, args) for model in models.values()] for _ in range(2 + args.rounds)][2:]
            for (mixer, model), took in zip(models.items(), zip(*rounds, strict=True), strict=True):
                row = {
                    "mixer": mixer,
                    "parameters": model.parameter_count(),
                    "context": context,
                    "horizon": args.horizon,
                    "rows": rows,
                    "forecasts_per_second": round(rows / statistics.median(took), 1),
                    "slowest": round(rows / max(took), 1),
                    "fastest": round(rows / min(took), 1),
                    "rounds": args.rounds,
                    "device": name,
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
