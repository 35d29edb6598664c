"""Kernels beside their peers: tests, three rounds of the main shapes, then everything once."""
import json, os, sys, time, subprocess
from pathlib import Path
import torch
from zoo import bench
from zoo.bench_report import table
from zoo.peers import SHAPES
t0 = time.time()
out = Path(os.environ["OUT"]); out.mkdir(exist_ok=True)
def shape(s): return f"{s.batch},{s.heads},{s.tokens},{s.head_dim},{s.window}"
peers = ["zoo", "zoo no gate", "flash-attention-4", "fla forgetting", "zoo from z, u"]
parts = {(p.name, s.head_dim) for s, p in bench.plan([], [])}
warming = [bench.start("warm", *part, []) for part in sorted(parts)]
try:
    bench.check_kernels(workers=12)
    print("TESTS green", time.time() - t0, flush=True)
except bench.BenchError as e:
    print("TESTS", str(e)[-4000:], flush=True)
for w in warming: w.wait()
print("warm", time.time() - t0, flush=True)
(out / "bench.json").write_text(json.dumps(bench.provenance(), indent=1))
rows = bench.measure(out / "main.csv", 3, peers, [shape(s) for s in SHAPES])
print("main", time.time() - t0, flush=True)
print(table(rows), flush=True)
try:
    rows = bench.measure(out / "all.csv", 1, [], [])
    print(table(rows), flush=True)
except Exception as e:
    print("all:", e, flush=True)
print("all", time.time() - t0, flush=True)
