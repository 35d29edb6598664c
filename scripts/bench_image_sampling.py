"""Images a second while sampling: windowed mixers with a state of constant size beside full attention.

    python scripts/bench_image_sampling.py                                   on this machine, batches 1, 16, 256
    python scripts/bench_image_sampling.py --batches 16 --side 32 --size 7m  one JSON row a measurement
    python scripts/bench_image_sampling.py --token pixel --window 256        a step draws a whole pixel

Random weights: speed does not depend on them. Every row is the median of `--rounds` whole batches of whole images,
after two short ones that are not counted; a batch that takes longer than `--patience` seconds is measured once, on its
first steps, and says so: a windowed mixer's step costs the same everywhere, but full attention is flattered by it.
"""

import argparse
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
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of the step")
    return parser.parse_args()


def build(mixer: str, args: argparse.Namespace, device: torch.device) -> Model:
    window = {"mixer": {"window": args.window}} if mixer in ("gatedfwa", "swa", "gatedfwa_nsa") else {}
    shape = {"height": args.side, "width": args.side, "channels": args.channels}
    shape |= {"name": "image_pixels"} if args.token == "pixel" else {"neighbours": True}
    model = zoo.create_model(f"image_{mixer}_{args.size}", backbone=window, head=shape)
    assert isinstance(model, Model)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def seconds(model: Model, batch: int, steps: int, args: argparse.Namespace, device: torch.device) -> float:
    prompt = Batch(torch.full((batch, 1, args.channels) if args.token == "pixel" else (batch, 1), 256))
    began = time.perf_counter()
    for _ in generate(model, prompt, max_new=steps, stream=True, seed=0, graph=args.graph):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elements = args.side * args.side * (1 if args.token == "pixel" else args.channels)
    for mixer in args.mixers:
        model = build(mixer, args, device)
        for batch in args.batches:
            short = min(32, elements)
            seconds(model, batch, short, args, device)
            expected = seconds(model, batch, short, args, device) * elements / short
            steps, rounds = (elements, args.rounds) if expected < args.patience else (min(256, elements), 1)
            taken = statistics.median(seconds(model, batch, steps, args, device) for _ in range(rounds))
            row = {
                "mixer": mixer,
                "token": args.token,
                "parameters": model.parameter_count(),
                "batch": batch,
                "elements": elements,
                "steps_measured": steps,
                "images_per_second": batch / (taken * elements / steps),
                "milliseconds_per_step": 1e3 * taken / steps,
                "state_bytes_per_image": model.backbone.state_bytes(elements, 2 if device.type == "cuda" else 4),
                "graph": args.graph,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
