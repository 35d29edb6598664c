"""Old tree against new tree: NSA's whole forward as a CUDA graph, and the new one's kernels.

    python3 .gpu-ab/ab_launch.py OLD NEW [--limit 40] [--out $OUT]

Both trees compile at once, in processes of their own (helpers fill Triton's cache beside them); then one at a time is
asked for one figure after the other, the trees in turn. Every figure is printed as it comes. `bits`: a hash of the
output of either tree on the same inputs; they should be equal.
"""

import argparse
import hashlib
import os
import queue
import subprocess
import sys
import threading
import time
from functools import partial

HEADS, KV, DIM, BLOCK, TOP, WINDOW = 64, 4, 128, 64, 16, 512


# -------------------------------------------------------------------------------------------------------- in a process


def inputs(tokens):
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    def normal(heads):
        return torch.randn(1, tokens, heads, DIM, device="cuda", generator=generator).bfloat16()
    q, k, v = normal(HEADS), normal(KV), normal(KV)
    gates = torch.rand(1, tokens, HEADS, 3, device="cuda", generator=generator).bfloat16()
    decay = -0.05 * torch.rand(1, tokens, HEADS, device="cuda", generator=generator)
    return q, k, v, gates, decay


def serve(role):
    import torch

    from zoo import bench, ops

    torch.set_grad_enabled(False)
    options = {"block": BLOCK, "top": TOP}

    def whole(x):
        return ops.nsa_attention(*x, **options, window=WINDOW)

    x = inputs(2048)
    q, k, v, gates, decay = x
    if role == "gist":
        means = [ops.pool_blocks(y, BLOCK) for y in (k, v)]
        ops.compressed_attention(q, *means, **options)
        torch.cuda.synchronize()
        return
    if role == "window":
        ops.window_attention(q, k, v, decay, window=WINDOW)
        ops.mix_branches(gates, q, q, q)
        torch.cuda.synchronize()
        return
    index = torch.rand(1, 2048, KV, 32, device="cuda").topk(TOP).indices.int()
    ops.selected_attention(q, k, v, index, block=BLOCK)
    torch.cuda.synchronize()
    whole(x)
    whole(inputs(65536))
    torch.cuda.synchronize()
    print("warm", flush=True)
    for line in sys.stdin:
        what, tokens = line.split()
        tokens = int(tokens)
        try:
            x = inputs(tokens)
            call = partial(whole, x)
            if what == "graph":
                print(f"{min(bench.graph_ms([call], least=1) for _ in range(3)):.4f}", flush=True)
            elif what == "keep":  # as in training, where the selected branch's out is kept
                with torch.enable_grad():
                    print(f"{bench.graph_ms([call], least=1):.4f}", flush=True)
            elif what == "host":
                print(f"{bench.queued_ms(call)[1]:.3f}", flush=True)
            elif what == "bits":
                out = call()
                print(hashlib.sha1(out.view(torch.int16).cpu().numpy().tobytes()).hexdigest()[:12], flush=True)
            elif what == "profile":
                print(profile(call), flush=True)
        except Exception as error:
            print(f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        x = call = None
        torch.cuda.empty_cache()


def profile(call):
    """As `name*count*us` of one call, in the order of time; the last: nodes and their sum."""
    import torch
    from torch.profiler import ProfilerActivity

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    rows = [(e.key, e.count / 5, getattr(e, "self_device_time_total", 0.0) / 5) for e in found.key_averages()]
    rows = [row for row in rows if row[2] > 0]
    rows.sort(key=lambda row: -row[2])
    text = [f"{name[:60].replace('|', ' ')}*{count:g}*{us:.1f}" for name, count, us in rows]
    text.append(f"ALL*{sum(row[1] for row in rows):g}*{sum(row[2] for row in rows):.1f}")
    return "|".join(text)


# ------------------------------------------------------------------------------------------------------------ the lead


class Child:
    def __init__(self, tree, role):
        tree = os.path.abspath(tree)
        path = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH", "")])])
        command = [sys.executable, os.path.abspath(__file__), "--serve", role]
        self.process = subprocess.Popen(
            command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(f"{OUT}/{os.path.basename(tree)}_{role}.err", "w"), text=True,
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)

    def answer(self, seconds):
        try:
            return self.lines.get(timeout=max(0.1, seconds)) or "ended"
        except queue.Empty:
            return "late"

    def ask(self, question, seconds):
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        except OSError:
            return "ended"
        return self.answer(seconds)


def main():
    start = time.monotonic()
    def left():
        return arguments.limit - (time.monotonic() - start)
    def say(text):
        line = f"[{time.monotonic() - start:5.1f}] {text}"
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    log = open(f"{OUT}/ab_launch.txt", "a")
    trees = {"old": arguments.old, "new": arguments.new}
    helpers = [Child(tree, role) for tree in trees.values() for role in ("gist", "window")]
    mains = {name: Child(tree, "main") for name, tree in trees.items()}
    try:
        for name, child in mains.items():
            answer = child.answer(left())
            say(f"{name}: {answer}")
        def both(what, tokens):
            found = {name: child.ask(f"{what} {tokens}", left()) for name, child in mains.items()}
            text = f"{what:5} T {tokens:6}   old {found['old']}   new {found['new']}"
            if what == "bits":
                text += "   equal" if found["old"] == found["new"] and len(found["new"]) == 12 else "   DIFFERENT"
            say(text)
        both("graph", 8192)
        both("graph", 2048)
        both("bits", 2048)
        both("graph", 65536)
        both("graph", 4096)
        both("graph", 16384)
        both("bits", 8192)
        for name, tokens in (("new", 2048), ("new", 8192), ("old", 2048), ("old", 8192)):
            if left() < 1:
                break
            rows = mains[name].ask(f"profile {tokens}", left()).split("|")
            say(f"kernels of {name}, T {tokens}: name*count*us")
            for row in rows:
                say(f"    {row}")
        both("host", 2048)
        both("graph", 8192)
        both("keep", 8192)
    finally:
        for child in [*helpers, *mains.values()]:
            child.process.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--limit", type=float, default=40)
    parser.add_argument("--out", default=os.environ.get("OUT", "/tmp"))
    parser.add_argument("--serve")
    arguments = parser.parse_args()
    OUT = arguments.out
    if arguments.serve:
        serve(arguments.serve)
    else:
        main()
