"""Images a second while sampling: windowed mixers with a state of constant size beside full attention.

    python scripts/bench_image_sampling.py                                   on this machine, batches 1, 16, 256
    python scripts/bench_image_sampling.py --batches 16 --side 32 --size 7m  one JSON row a measurement
    python scripts/bench_image_sampling.py --token pixel --window 256        a step draws a whole pixel

Random weights: speed does not depend on them. Every row is the median of `--rounds` batches of whole images; the first
two steps, with the prefill and the recording of a graph, are not counted. A batch that would take longer than
`--patience` seconds is measured on `--sampled` steps at the start, in the middle and at the end, each after a prompt
that fills the cache so far, and says so: full attention costs a step in proportion to what is filled, so Simpson's rule
gives the whole. A growing cache is a padded one: it has its full size from the first step, pays for no allocation, and
a step reads what is filled alone, on a CPU as on a GPU.
"""

import argparse
import itertools
import json
import statistics
import time

import torch

import zoo
from zoo.generation import generate
from zoo.model import Batch, Model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", default=["gatedfwa", "swa", "softmax"])
    parser.add_argument("--size", default="20m")
    parser.add_argument("--side", type=int, default=32, help="of the square images, in pixels")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--token", choices=["element", "pixel"], default="element", help="what a step draws")
    parser.add_argument("--window", type=int, default=288)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--sampled", type=int, default=16, help="steps at each place, where patience ends")
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of the step")
    return parser.parse_args()


def build(mixer: str, args: argparse.Namespace, device: torch.device) -> Model:
    window = {"mixer": {"window": args.window}} if mixer in ("gatedfwa", "swa", "gatedfwa_nsa") else {}
    shape = {"height": args.side, "width": args.side, "channels": args.channels}
    shape |= {"name": "image_pixels"} if args.token == "pixel" else {"neighbours": True}
    model = zoo.create_model(f"image_{mixer}_{args.size}", backbone=window, head=shape)
    assert isinstance(model, Model)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def seconds_per_step(model: Model, batch: int, before: int, steps: int, args: argparse.Namespace) -> float:
    """Mean of `steps` steps after `before` elements of an image and two more."""
    device = next(model.parameters()).device
    prompt = torch.randint(256, (batch, before + 1, args.channels) if args.token == "pixel" else (batch, before + 1))
    prompt[:, 0] = 256
    drawing = generate(model, Batch(prompt), max_new=elements(args) - before, stream=True, seed=0, graph=args.graph)
    for _ in range(2):  # the prefill; the recording and its first replay
        next(drawing)
    wait_for(device)
    began = time.perf_counter()
    for _ in itertools.islice(drawing, steps):
        pass
    wait_for(device)
    return (time.perf_counter() - began) / steps


def elements(args: argparse.Namespace) -> int:
    return args.side * args.side * (1 if args.token == "pixel" else args.channels)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(model: Model, batch: int, args: argparse.Namespace) -> tuple[float, int]:
    """Mean seconds of a step over whole images, and of how many steps at each time."""
    whole, few = elements(args) - 2, min(args.sampled, (elements(args) - 2) // 2)
    places = (0, whole // 2, whole - few)
    seconds_per_step(model, batch, 0, few, args)  # warms up
    start, middle, end = (seconds_per_step(model, batch, place, few, args) for place in places)
    mean = (start + 4 * middle + end) / 6
    if mean * whole > args.patience:
        return mean, 3 * few
    return statistics.median(seconds_per_step(model, batch, 0, whole, args) for _ in range(args.rounds)), whole


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for mixer in args.mixers:
        model = build(mixer, args, device)
        for batch in args.batches:
            taken, steps = measured(model, batch, args)
            row = {
                "mixer": mixer,
                "token": args.token,
                "parameters": model.parameter_count(),
                "batch": batch,
                "elements": elements(args),
                "steps_measured": steps,
                "images_per_second": batch / (taken * elements(args)),
                "milliseconds_per_step": 1e3 * taken,
                "state_bytes_per_image": model.backbone.state_bytes(elements(args), 2 if device.type == "cuda" else 4),
                "graph": args.graph,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
