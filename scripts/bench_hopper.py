"""prep P N | work START | main BUDGET : hopper forward/backward, correctness then speed. JSON rows in $OUT/results.csv"""
import json, os, subprocess, sys, time
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # the repository's root for zoo, this folder for plan.py
OUT = os.environ.get("OUT", "/tmp")
SHAPES = [(4, 16, 16384, 512), (4, 16, 16384, 2048)]
from plan import jobs

import torch
DT = {"bf16": torch.bfloat16, "fp16": torch.float16}
def setup(B, H, G, T, N, D, dt, seed=0, q_scale=1.0, gate_bias=4.0, spans=None, gated=True, scatter=False):
    g = torch.Generator(device="cuda").manual_seed(seed)
    r = lambda *s: torch.randn(*s, device="cuda", generator=g)
    q, k, v = (r(B, T, H, D) * q_scale).to(DT[dt]), r(B, N, G, D).to(DT[dt]), r(B, N, G, D).to(DT[dt])
    ld = -torch.nn.functional.softplus(-(gate_bias + r(B, N, H))) if gated else None
    if scatter and gated: ld = torch.where(torch.rand(B, N, H, device="cuda", generator=g) < 0.02, -60.0, ld)   # hard resets
    dout = r(B, T, H, D).to(DT[dt]); dlse = r(B, T, H)
    sp = None
    if spans == "key_start":
        ks = torch.randint(0, max(1, N // 3), (B,), device="cuda", generator=g, dtype=torch.int32)
        sp = (ks[:, None].expand(-1, N), torch.full((B, N), N, dtype=torch.int32, device="cuda"))
    if spans == "docs":
        cuts = torch.sort(torch.randint(1, N, (5,), device="cuda", generator=g)).values
        doc = torch.bucketize(torch.arange(N, device="cuda"), cuts, right=True)
        edges = torch.cat([torch.zeros(1, device="cuda", dtype=torch.long), cuts, torch.tensor([N], device="cuda")])
        sp = (edges[doc][None].expand(B, N).int().contiguous(), edges[doc + 1][None].expand(B, N).int().contiguous())
    return q, k, v, ld, dout, dlse, sp

def reference(q, k, v, ld, dout, dlse, sp, window, scale):
    B, T, H, D = q.shape; N, G = k.shape[1:3]
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(H // G, 2)) * scale
    pos = torch.arange(T, device="cuda") + N - T; key = torch.arange(N, device="cuda")
    grads = [q, k, v]
    if ld is not None:
        ld = ld.double().requires_grad_(); grads.append(ld)
        U = ld.cumsum(1).transpose(1, 2)
        s = s + U[:, :, pos][..., None] - U[:, :, None, :]
    W = window or N
    lo = (pos - W + 1).clamp(min=0)[None].expand(B, T)
    if sp is not None: lo = torch.maximum(lo, sp[0][:, pos])
    vis = ((key[None, None] <= pos[None, :, None]) & (key[None, None] >= lo[..., None]))[:, None]
    s = s.masked_fill(~vis, float("-inf"))
    lse = torch.logsumexp(s, -1)
    lsef = torch.where(lse.isinf(), torch.zeros_like(lse), lse)
    p = torch.exp(s - lsef[..., None]).masked_fill(~vis, 0)
    out = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(H // G, 2))
    loss = (out * dout.double()).sum()
    if dlse is not None: loss = loss + (torch.where(lse.isinf(), 0, lsef).transpose(1, 2) * dlse.double()).sum()
    return out.detach(), lse.detach().transpose(1, 2), torch.autograd.grad(loss, grads)

def plan_of(x):
    from zoo.kernels.hopper_band import Schedule
    return Schedule(*x) if x else None

def modules():
    import zoo.kernels.hopper_forward as hf, zoo.kernels.hopper_backward as hb
    return hf, hb

def rel(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()

CASES = [  # B,H,G,T,N,W,q_scale,spans,scatter,seed
    dict(s=(1, 2, 2, 1024, 1024), W=512), dict(s=(2, 4, 2, 577, 577), W=100, scatter=True), dict(s=(1, 4, 1, 700, 700), W=None),
    dict(s=(1, 2, 2, 300, 300), W=1), dict(s=(1, 2, 2, 900, 900), W=300, qs=20.0), dict(s=(1, 2, 1, 900, 900), W=300, qs=150.0),
    dict(s=(2, 2, 1, 200, 429), W=130), dict(s=(1, 2, 2, 1, 333), W=64), dict(s=(1, 2, 2, 63, 63), W=2048)]
BOUNDED = [dict(s=(2, 2, 1, 200, 429), W=130, spans="key_start"), dict(s=(1, 4, 2, 700, 700), W=200, spans="docs"), dict(s=(2, 2, 2, 500, 500), W=None, spans="key_start")]

def run_fwd(job, q, k, v, gate, W, scale, sp):
    hf, hb = modules()
    if job.get("window_py"):
        import zoo.kernels.window as w; return w.window_forward(q, k, v, gate, window=W, scale=scale, spans=sp)
    return hf.window_forward(q, k, v, gate, window=W, scale=scale, spans=sp, schedule=plan_of(job.get("tiles")), hopeful=job.get("hopeful"))

def run_bwd(job, dout, dlse, q, k, v, out, lse, gate, W, scale, sp):
    hf, hb = modules()
    if job.get("window_py"):
        import zoo.kernels.window as w; return w.window_backward(dout, dlse, q, k, v, out, lse, gate, window=W, scale=scale, spans=sp)
    return hb.window_backward(dout, dlse, q, k, v, out, lse, gate, window=W, scale=scale, spans=sp, dq_schedule=plan_of(job.get("dq_plan")), dkv_schedule=plan_of(job.get("dkv_plan")))

def check(job, cases):
    res = {}
    D, dt = job["D"], job.get("dt", "bf16"); scale = D ** -0.5
    tol = 8e-3 if dt == "bf16" else 2e-3
    for c in cases:
        q, k, v, ld, dout, dlse, sp = setup(*c["s"], D, dt, 1, c.get("qs", 1.0), 4.0 if c.get("qs", 1) == 1 else 1.0, c.get("spans"), job.get("gated", True), c.get("scatter", False))
        if c["W"] == 100: dlse = None
        ro, rl, rg = reference(q, k, v, ld, dout, dlse, sp, c["W"], scale)
        gate = () if ld is None else (ld,)
        errs = {}
        if job["kind"] == "fwd":
            poison(q)
            o, l = run_fwd(job, q, k, v, gate, c["W"], scale, sp)
            poison(q)
            o2, l2 = run_fwd(job, q, k, v, gate, c["W"], scale, sp); torch.cuda.synchronize()
            errs["out"] = rel(o, ro); fin = ~rl.isinf()
            errs["lse"] = ((l.double() - rl)[fin].abs() / (1 + rl[fin].abs())).max().item() * 10
            if not torch.equal(l[~fin].double(), rl[~fin]): errs["lseinf"] = float("nan")
            if not (torch.equal(o, o2) and torch.equal(l, l2)): errs["same"] = float("inf")
        else:
            o, l = ro.to(q.dtype), rl.float().contiguous()
            if c.get("qs", 1) > 100: continue
            poison(q)
            g = run_bwd(job, dout, dlse, q, k, v, o, l, gate, c["W"], scale, sp)
            poison(q)
            g2 = run_bwd(job, dout, dlse, q, k, v, o, l, gate, c["W"], scale, sp); torch.cuda.synchronize()
            flat = [*g[:3], *g[3]]; flat2 = [*g2[:3], *g2[3]]
            for n, a, b, r in zip(("dq", "dk", "dv", "dg"), flat, flat2, rg):
                if r.norm() < 1e-9: errs[n] = 0.0 if a.abs().max() < 1e-2 else float("nan"); continue
                errs[n] = rel(a, r)
                if not torch.equal(a, b): errs["same_" + n] = float("inf")
        t = tol * (3 if c.get("qs", 1) > 1 else 1)
        bad = {n: e for n, e in errs.items() if not e < (t if n != "dg" else 2 * t)}
        if bad: print("  BAD", job, c, errs, flush=True)
        for n, e in errs.items(): res[n] = max(res.get(n, 0), e) if e == e else float("nan")
        res["bad"] = res.get("bad", 0) + bool(bad)
    return res

def poison(q):
    """Fill what the allocator will hand out next with NaN."""
    xs = [torch.full((q.numel(),), float("nan"), device="cuda", dtype=q.dtype) for _ in range(6)] + [torch.full((q.numel(),), float("nan"), device="cuda") for _ in range(3)]
    del xs

def pairs(T, W): return T * W - W * (W - 1) // 2

def bench(job):
    import triton
    row = {}
    do_bench = lambda f: triton.testing.do_bench(f, warmup=10, rep=job.get("rep", 40), return_mode="median")
    D, dt = job["D"], job.get("dt", "bf16"); scale = D ** -0.5
    for (B, H, T, W) in job.get("shapes", SHAPES):
        G = job.get("G", H)
        q, k, v, ld, dout, dlse, sp = setup(B, H, G, T, T, D, dt, 2, gated=job.get("gated", True))
        if job.get("docs"):
            e = torch.arange(T, device="cuda", dtype=torch.int32) // job["docs"] * job["docs"]
            sp = (e[None].expand(B, T).contiguous(), (e + job["docs"]).clamp(max=T)[None].expand(B, T).contiguous())
        gate = () if ld is None else (ld,)
        fl = 4 * B * H * pairs(T, W) * D / 1e9
        hf, hb = modules()
        if not job.get("with_gate_pass") and gate:   # the gate's own passes are timed apart
            import zoo.kernels.gate as gg
            pre = gg.prefix(gate); hf.gates = hb.gates = type("G", (), dict(prefix=staticmethod(lambda g: pre), prefix_backward=staticmethod(lambda d, g, e: (d,))))
        key = f"{T}w{W}" if (B, H, T, W) not in SHAPES else f"w{W}"
        if job["kind"] == "fwd":
            ms = do_bench(lambda: run_fwd(job, q, k, v, gate, W, scale, sp))
            row["ms" + key], row["tf" + key] = round(ms, 4), round(fl / ms, 1)
        else:
            o, l = hf.window_forward(q, k, v, gate, window=W, scale=scale, spans=sp)
            f = lambda: run_bwd(job, dout, None, q, k, v, o, l, gate, W, scale, sp)
            ms = do_bench(f)
            row["ms" + key], row["tf" + key] = round(ms, 4), round(2.5 * fl / ms, 1)
            if not job.get("window_py"):
                keep = hb.dkv_kernel
                class Nothing:
                    def __getitem__(self, grid): return lambda *a, **k: None
                hb.dkv_kernel = Nothing()
                row["dq" + key] = round(do_bench(f), 4); hb.dkv_kernel = keep
        if gate and not job.get("with_gate_pass"): hf.gates = hb.gates = gg
        del q, k, v, ld, dout, dlse, sp
    return row

def special(job):
    import triton
    import zoo.kernels.gate as gg
    do = lambda f: triton.testing.do_bench(f, warmup=10, rep=60, return_mode="median")
    row = {}
    for dt in (torch.bfloat16, torch.float32):
        z, u = (torch.randn(1, 65536, 16, device="cuda", dtype=dt) for _ in range(2))
        row[f"prefix_zu_{dt}"] = do(lambda: gg.prefix((z, u)))
        graph = torch.cuda.CUDAGraph(); gg.prefix((z, u)); torch.cuda.synchronize()
        with torch.cuda.graph(graph): gg.prefix((z, u))
        row[f"prefix_zu_graph_{dt}"] = do(lambda: graph.replay())
        d = torch.randn(1, 16, 65536, device="cuda")
        row[f"prefix_bwd_{dt}"] = do(lambda: gg.prefix_backward(d, (z, u), None))
    return row

def work(start):
    J = jobs()
    for i in range(start, len(J)):
        job = J[i]
        open(os.path.join(OUT, "progress"), "w").write(f"{i}")
        row = dict(i=i, **job)
        try:
            if job["kind"] == "gate": row.update(special(job))
            else:
                if job.get("check", True): row.update(check(job, (BOUNDED if job.get("bounded") else CASES)))
                if job.get("time", True): row.update(bench(job))
        except Exception as e:
            import traceback; row["error"] = traceback.format_exc()[-400:]
            if "CUDA error" in repr(e):
                print(i, job, row, flush=True); open(os.path.join(OUT, "results.csv"), "a").write(json.dumps(row) + "\n"); os._exit(3)
        print({k: (round(x, 5) if isinstance(x, float) else x) for k, x in row.items()}, flush=True)
        open(os.path.join(OUT, "results.csv"), "a").write(json.dumps(row) + "\n")
    open(os.path.join(OUT, "progress"), "w").write("done")

def prep(part, parts):
    hf, hb = modules()
    class Warm:
        def __init__(self, kernel): self.kernel = kernel
        def __getitem__(self, grid): return lambda *a, **k: self.kernel.warmup(*a, grid=grid, **k)
    hf.forward_kernel, hb.dq_kernel, hb.dkv_kernel = Warm(hf.forward_kernel), Warm(hb.dq_kernel), Warm(hb.dkv_kernel)
    todo = []
    for job in jobs():
        if job["kind"] in ("fwd", "bwd") and not job.get("window_py"): todo.append(job)
    for i, job in enumerate(todo):
        if i % parts != part: continue
        try:
            for with_dlse in ((True, False) if job["kind"] == "bwd" else (False,)):
                q, k, v, ld, dout, dlse, sp = setup(1, 2, 2, 192, 192, job["D"], job.get("dt", "bf16"), spans="docs" if job.get("bounded") or job.get("docs") else None, gated=job.get("gated", True))
                gate = () if ld is None else (ld,)
                if job["kind"] == "fwd": run_fwd(job, q, k, v, gate, 64, 0.125, sp)
                else: run_bwd(job, dout, dlse if with_dlse else None, q, k, v, q, torch.zeros_like(dlse), gate, 64, 0.125, sp)
        except Exception as e: print("prep", job, repr(e)[-300:], flush=True)

def main(budget):
    t0 = time.time(); n = 14
    ps = [subprocess.Popen([sys.executable, __file__, "prep", str(j), str(n)]) for j in range(n)]
    for p in ps:
        try: p.wait(timeout=max(1, 90 - (time.time() - t0)))
        except subprocess.TimeoutExpired: p.kill()
    print(f"prep {time.time()-t0:.0f}s", flush=True)
    start = 0
    while time.time() - t0 < budget:
        p = subprocess.Popen([sys.executable, __file__, "work", str(start)])
        last, since = None, time.time()
        while p.poll() is None and time.time() - t0 < budget:
            time.sleep(0.3)
            try: cur = open(os.path.join(OUT, "progress")).read()
            except OSError: cur = None
            if cur != last: last, since = cur, time.time()
            if time.time() - since > 30: break
        if p.poll() is None: p.kill(); p.wait()
        if last == "done": break
        start = int(last or start) + 1
        print("STUCK or crashed; restart at", start, flush=True)
        open(os.path.join(OUT, "results.csv"), "a").write(json.dumps(dict(i=start - 1, error="hang/crash")) + "\n")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    import triton
    ms = triton.testing.do_bench(lambda: a @ a, warmup=10, rep=50, return_mode="median")
    print("matmul", 2 * 8192**3 / ms / 1e9, torch.cuda.get_device_name(), f"total {time.time()-t0:.0f}s")

if __name__ == "__main__":
    if sys.argv[1] == "prep": prep(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "work": work(int(sys.argv[2]))
    else: main(float(sys.argv[2]))
