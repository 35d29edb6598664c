"""The real-time factor of sound that is drawn as a stream, from its first second to its last.

    python scripts/bench_audio_streaming.py runs/audio-fsdd_codes --seconds 600
    python scripts/bench_audio_streaming.py runs/audio-fsdd_codes --seconds 600 --graph     on a GPU

A factor of 0.5 means that a second of sound takes half a second. One JSON row for each second named by --at, with
the median over the ten seconds of sound around it, and the bytes of everything that is remembered between two steps.
`processor_factor` counts this process's processor time in place of the clock's: what a busy machine leaves as it is.
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


def arrivals(pipe: Pipeline, args: argparse.Namespace) -> Iterator[tuple[float, float, float]]:
    """(seconds of sound that have come, seconds since the start, processor seconds since) after each piece."""
    given = pipe.task.prompt([None] * args.rows)
    count = pipe.task.elements(args.seconds)
    steps = generate(pipe.model, given, max_new=count, sampling=Sampling(), stream=True, seed=0, graph=args.graph)
    sound, began, used = 0, time.perf_counter(), time.process_time()
    for rows in pipe.task.pieces(given, steps) or ():
        sound += len(rows[0])
        yield sound / pipe.task.data.rate, time.perf_counter() - began, time.process_time() - used


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
    before, factors = (0.0, 0.0, 0.0), []
    first = 0.0
    for now in arrivals(pipe, args):
        sound, clock, used = now
        if before[0]:
            length = sound - before[0]
            factors.append((sound, (clock - before[1]) / length, (used - before[2]) / length))
        else:
            first = clock
        before = now
        while waiting and factors and sound >= min(waiting[0] + 5, args.seconds):
            at = waiting.pop(0)
            near, processor = zip(*[factor for place, *factor in factors if abs(place - at) <= 5], strict=True)
            row = {
                "run": args.run,
                "second": at,
                "real_time_factor": statistics.median(near),
                "worst_piece": max(near),
                "processor_factor": statistics.median(processor),
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
