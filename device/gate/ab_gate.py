"""Old against new, one call on the device:

    python ab_gate.py base=TREE new=TREE [other=TREE ...] [--rounds 3] [--check new,other] [--pytest new] [--only 0,1,..]

First correctness of the trees in --check (default: all but the first) in parallel processes, the first tree's errors beside
them; then times, one persistent process a tree, every shape by turns, --rounds times; then microseconds of each kernel of
two shapes, from the profiler. Everything has a time limit; figures are printed as they come.
"""
import json, os, select, signal, subprocess, sys, time
HERE = os.path.abspath(__file__)

def options(argv):
    trees, flags, i = {}, {"rounds": 3, "check": None, "pytest": None, "only": None}, 0
    while i < len(argv):
        if argv[i].startswith("--"):
            flags[argv[i][2:]] = argv[i + 1]; i += 2
        else:
            label, path = argv[i].split("=", 1); trees[label] = os.path.abspath(path); i += 1
    return trees, flags

def spawn(tree, *args, **kw):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([tree, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "2"}
    return subprocess.Popen([sys.executable, HERE, *args], cwd=tree, env=env, text=True, start_new_session=True, **kw)

def kill(p):
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass

# ------------------------------------------------------------------------------------------------------ correctness
SHARDS = 4

def checks():
    """name -> (Case, change(tensors), dtype, with gradients)"""
    import torch
    from tests.ops.definition import Case
    bf, fp = torch.bfloat16, torch.float16
    plain = lambda x: x
    def strong(nats):
        def change(x):
            x["log_decay"] *= 2 * nats; return x
        return change
    def resets(nats, share=.03):
        def change(x):
            g = torch.Generator().manual_seed(5)
            hit = torch.rand(x["log_decay"].shape, generator=g) < share
            x["log_decay"] = torch.where(hit, -float(nats), .1 * x["log_decay"]).to(x["log_decay"].dtype); return x
        return change
    def logits(std):
        def change(x):
            x["q"] = x["q"] * std; return x
        return change
    out = {}
    for d in (64, 128):
        for w in (1, 64, 100, 130, 512, None):
            out[f"D{d} W{w} T517"] = (Case("c", 517, w, batch=2, heads=4, kv_heads=4, dim=d), plain, bf, True)
        for n in (1, 3, 6, 9, 15):
            out[f"D{d} gate {n} nats"] = (Case("c", 1000, 300, heads=4, kv_heads=4, dim=d), strong(n), bf, True)
        for n in (60, 120):
            out[f"D{d} resets {n}"] = (Case("c", 1000, 300, heads=4, kv_heads=4, dim=d), resets(n), bf, True)
        for s in (20, 150):
            out[f"D{d} logits std {s}"] = (Case("c", 1000, 300, heads=4, kv_heads=4, dim=d), logits(s), bf, s == 20)
            out[f"D{d} logits std {s} no gate"] = (Case("c", 1000, 300, "none", heads=4, kv_heads=4, dim=d), logits(s), bf, s == 20)
        out[f"D{d} no gate"] = (Case("c", 777, 200, "none", heads=4, kv_heads=2, dim=d), plain, bf, True)
        out[f"D{d} groups"] = (Case("c", 777, 200, heads=8, kv_heads=2, dim=d), plain, bf, True)
        out[f"D{d} documents"] = (Case("c", 700, 128, heads=4, kv_heads=2, dim=d, cu_seqlens=(0, 0, 1, 130, 256, 256, 640, 700)), plain, bf, True)
        out[f"D{d} documents strong"] = (Case("c", 700, 128, heads=4, kv_heads=2, dim=d, cu_seqlens=(0, 0, 1, 130, 256, 256, 640, 700)), strong(9), bf, True)
        out[f"D{d} key_start"] = (Case("c", 300, 100, keys=600, batch=2, dim=d, heads=4, kv_heads=4, key_start=(0, 550)), plain, bf, True)
        out[f"D{d} T<N odd"] = (Case("c", 333, 200, keys=700, batch=2, heads=4, kv_heads=2, dim=d), plain, bf, True)
        out[f"D{d} one late query"] = (Case("c", 1, 512, keys=900, dim=d), plain, bf, True)
        out[f"D{d} fp16"] = (Case("c", 517, 130, batch=2, heads=4, kv_heads=4, dim=d), plain, fp, True)
        out[f"D{d} fp16 gate 9"] = (Case("c", 517, 130, batch=2, heads=4, kv_heads=4, dim=d), strong(9), fp, True)
    return out

def check(shard):
    import torch
    from tests.ops.cases import poison_new_tensors
    from tests.ops.definition import relative_error
    from tests.ops.run_case import run
    from tests.ops import test_gpu
    class Patch:
        setattr = staticmethod(setattr)
    poisoned = False
    for i, (name, (case, change, dtype, grads)) in enumerate(checks().items()):
        if i % SHARDS != shard: continue
        try:
            tensors = test_gpu.on_gpu(case, dtype, lambda c: change(c.tensors()))
            truth = test_gpu.exact(case, tensors, torch.float64)
            if not poisoned:
                poison_new_tensors(Patch); poisoned = True
            found, again = run(case, tensors), run(case, tensors)
            errors = {k: relative_error(x, truth[k]) for k, x in found.items() if grads or k in ("out", "lse")}
            same = all(torch.equal(found[k], again[k]) for k in found)
            print(json.dumps({"name": name, "errors": errors, "same": same}), flush=True)
        except Exception as e:
            print(json.dumps({"name": name, "errors": {"failed": 1.0}, "same": True, "why": f"{type(e).__name__}: {e}"[:300]}), flush=True)

def run_checks(trees, labels, limit):
    begin = time.time()
    procs = {(label, s): spawn(trees[label], "check", str(s), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for label in labels for s in range(SHARDS)}
    results = {label: {} for label in labels}
    for (label, s), p in procs.items():
        try: out, err = p.communicate(timeout=max(1, limit - (time.time() - begin)))
        except subprocess.TimeoutExpired:
            kill(p); out, err = p.communicate(); print(f"CHECK {label} shard {s}: cut at {limit} s (a hang?)", flush=True)
        for line in out.splitlines():
            if line.startswith("{"):
                r = json.loads(line); results[label][r["name"]] = r
        if p.returncode: print(f"CHECK {label} shard {s} rc {p.returncode}:", err[-1500:], flush=True)
    base, good = results[labels[0]], {}
    for label in labels[1:]:
        bad = []
        for name, r in results[label].items():
            b = base.get(name, {}).get("errors", {})
            for k, e in r["errors"].items():
                limit_ = 1e-4 if k == "lse" else 2.4e-2
                if not e <= limit_ or (k in b and e > 1.5 * b[k] + 1e-3) or not r["same"]:
                    bad.append(f"  {name}: {k} {e:.2e} (base {b.get(k, float('nan')):.2e}) same {r['same']} {r.get('why', '')}")
        good[label] = not bad
        top = {}
        for r in results[label].values():
            for k, e in r["errors"].items(): top[k] = max(top.get(k, 0), e)
        print(f"CHECK {label}: {len(results[label])} of {len(checks_count)} cases, {len(bad)} off; largest " + " ".join(f"{k} {e:.1e}" for k, e in top.items()), flush=True)
        print("\n".join(bad[:25]), flush=True) if bad else None
    print(f"checks took {time.time() - begin:.0f} s", flush=True)

# ------------------------------------------------------------------------------------------------------------- times

def timer():
    import torch
    from zoo.bench import queued_ms
    from zoo.peers import SHAPES, Inputs, Shape, ours
    def calls(shape, gated):
        call, leaves, dout = ours(gated)(Inputs.random(shape))
        out = call()
        out = out[0] if isinstance(out, tuple) else out
        return call, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for h, d in ((16, 64), (16, 128), (4, 64), (4, 128)):  # compile
        for gated in (True, False):
            for c in calls(Shape(1, h, 1024, d, 512), gated): c()
    torch.cuda.synchronize()
    print(json.dumps({"ready": 1}), flush=True)
    for line in sys.stdin:
        what, number = line.split()
        shape, row = SHAPES[int(number)], {}
        for gated in (True, False):
            pair = calls(shape, gated)
            if what == "time":
                for direction, c in zip(("forward", "backward"), pair):
                    with torch.set_grad_enabled(direction == "backward"):
                        queued_ms(c, 1)  # the first figure is thrown away
                        row[f"{direction} {'on' if gated else 'off'}"] = queued_ms(c, 25)[0]
            else:
                from torch.profiler import ProfilerActivity, profile
                for c in pair: c()
                with profile(activities=[ProfilerActivity.CUDA]) as p:
                    for _ in range(8):
                        for c in pair: c()
                    torch.cuda.synchronize()
                for e in p.key_averages():
                    row[f"{e.key[:20]} {'on' if gated else 'off'}"] = getattr(e, "self_device_time_total", 0) / 8
            del pair
        torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)

def ask(p, text, limit):
    p.stdin.write(text + "\n"); p.stdin.flush()
    return hear(p, limit)

def hear(p, limit):
    end = time.time() + limit
    while time.time() < end:
        if select.select([p.stdout], [], [], max(0.1, end - time.time()))[0]:
            line = p.stdout.readline()
            if line == "": return None
            if line.startswith("{"): return json.loads(line)
    return None

def main():
    trees, flags = options(sys.argv[1:])
    labels = list(trees)
    rounds = int(flags["rounds"])
    wanted = flags["check"].split(",") if flags["check"] else labels[1:]
    tests = None
    if flags["pytest"]:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([trees[flags["pytest"]], os.environ.get("PYTHONPATH", "")])}
        tests = subprocess.Popen([sys.executable, "-m", "pytest", "-m", "gpu", "-n", "8", "-q", "-x", "tests/ops/test_gpu.py", "-k",
            "error_is or outgrow or part_rows or many_items or pruned_tiles or same_bits or uninit or by_segments"],
            cwd=trees[flags["pytest"]], env=env, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timers = {label: spawn(trees[label], "timer", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(f"/tmp/timer_{label}.err", "w")) for label in labels}
    if wanted != ["none"]:
        run_checks(trees, [labels[0], *wanted], 60)
    if tests:
        try: out, _ = tests.communicate(timeout=90)
        except subprocess.TimeoutExpired: kill(tests); out, _ = tests.communicate(); print("PYTEST cut at its limit")
        print("PYTEST", out[-1500:], flush=True)
    for label, p in list(timers.items()):
        if hear(p, 60) is None:
            print(f"TIMER {label} died or hangs:", open(f"/tmp/timer_{label}.err").read()[-1500:], flush=True); kill(p); del timers[label]
    names = ["16x16x4096 64 512", "4x16x16384 64 512", "4x16x16384 64 2048", "4x16x16384 128 512", "4x16x16384 128 2048",
             "1x16x65536 64 512", "1x16x65536 128 1024", "1x4x1M 64 512", "1x4x1M 128 512"]
    numbers = [int(x) for x in flags["only"].split(",")] if flags["only"] else range(9)
    seen = {}
    for r in range(rounds):
        for n in numbers:
            for label, p in list(timers.items()):
                row = ask(p, f"time {n}", 40)
                if row is None:
                    print(f"TIMER {label} shape {n}: no answer", open(f"/tmp/timer_{label}.err").read()[-800:], flush=True); kill(p); del timers[label]; continue
                print(f"r{r} {names[n]} {label}: " + " ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
                for k, v in row.items(): seen.setdefault((n, label, k), []).append(v)
    med = lambda v: sorted(v)[len(v) // 2]
    print("median ms: shape | tree | forward on off gate% (to first tree's on) | backward on off gate% (to first)")
    for n in numbers:
        for label in labels:
            if (n, label, "backward off") not in seen: continue
            text = f"{names[n]:>20} | {label:>6}"
            for d in ("forward", "backward"):
                on, off = med(seen[n, label, f"{d} on"]), med(seen[n, label, f"{d} off"])
                first = med(seen.get((n, labels[0], f"{d} on"), [on]))
                text += f" | {on:.4f} {off:.4f} {100 * (on / off - 1):5.1f}% ({100 * (on / first - 1):+.1f}%)"
            print(text, flush=True)
    for n in (1, 3):
        rows = {label: ask(p, f"profile {n}", 40) or {} for label, p in timers.items()}
        keys = sorted({k for row in rows.values() for k in row if max(row.get(k, 0) for row in rows.values()) > 2})
        print(f"microseconds by kernel, {names[n]}: " + " ".join(labels))
        for k in keys: print(f"  {k:>26} " + " ".join(f"{rows.get(label, {}).get(k, float('nan')):9.1f}" for label in labels), flush=True)
    for p in timers.values(): kill(p)

if __name__ == "__main__":
    if sys.argv[1] == "check":
        signal.alarm(60); check(int(sys.argv[2]))
    elif sys.argv[1] == "timer":
        timer()
    else:
        checks_count = range(52)
        main()
