"""The real-time factor of sound that is drawn as a stream, from its first second to its last.

    python scripts/bench_audio_streaming.py runs/audio-fsdd_codes --seconds 600
    python scripts/bench_audio_streaming.py runs/audio-fsdd_codes --seconds 600 --graph     on a GPU

A factor of 0.5 means that a second of sound takes half a second. One JSON row for each second named by --at, with
the median over the ten seconds of sound around it, and the bytes of everything that is remembered between two steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator

import torch

from zoo.generation import Sampling, generate
from zoo.pipelines import Pipeline, pipeline
from zoo.state import state_bytes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run of the task audio")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--at", type=float, nargs="+", default=[1, 10, 60, 300, 600], help="seconds to report")
    parser.add_argument("--rows", type=int, default=1, help="streams at once")
    parser.add_argument("--device")
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of the step")
    return parser.parse_args()


def arrivals(pipe: Pipeline, args: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """(seconds of sound that have come, seconds since the start) after each piece."""
    given = pipe.task.prompt([None] * args.rows)
    count = pipe.task.elements(args.seconds)
    steps = generate(pipe.model, given, max_new=count, sampling=Sampling(), stream=True, seed=0, graph=args.graph)
    sound, began = 0, time.perf_counter()
    for rows in pipe.task.pieces(given, steps) or ():
        sound += len(rows[0])
        yield sound / pipe.task.data.rate, time.perf_counter() - began


def remembered(pipe: Pipeline, seconds: float, rows: int) -> int:
    """Bytes of the states of model, head and codec, as they are made for a stream of so many seconds."""
    given = pipe.task.prompt([None] * rows)
    model, codec = pipe.model, pipe.task.codec
    total = state_bytes(model.backbone.init_cache(rows, pipe.task.elements(seconds) + 1))
    total += state_bytes(model.head.init_state(given.inputs, given.condition))
    return total + (state_bytes(codec.start_decoding(rows)) if codec is not None else 0)


def main() -> None:
    args = parse()
    pipe = pipeline(args.run, device=args.device)
    device = next(pipe.model.parameters()).device
    if pipe.task.codec is not None:
        pipe.task.codec.to(device)
    short = argparse.Namespace(**{**vars(args), "seconds": 1.0})
    list(arrivals(pipe, short))  # kernels compile and choose their tiles
    waiting = sorted(at for at in args.at if at <= args.seconds)
    first, before, before_clock, factors = 0.0, 0.0, 0.0, []
    for sound, clock in arrivals(pipe, args):
        if before:
            factors.append((sound, (clock - before_clock) / (sound - before)))
        else:
            first = clock
        before, before_clock = sound, clock
        while waiting and factors and sound >= min(waiting[0] + 5, args.seconds):
            at = waiting.pop(0)
            near = [factor for sound, factor in factors if abs(sound - at) <= 5]
            row = {
                "run": args.run,
                "second": at,
                "real_time_factor": statistics.median(near),
                "worst_piece": max(near),
                "first_piece_after_s": first,
                "state_bytes": remembered(pipe, at, args.rows),
                "rows": args.rows,
                "graph": args.graph,
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
