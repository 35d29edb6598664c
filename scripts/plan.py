"""What bench_hopper.py checks and times: a list of jobs, the most important first. Edit freely.

kind fwd | bwd | gate; D; tiles (fwd), dq_plan, dkv_plan (bwd): Schedule fields or None for the table's; gated, bounded, dt,
hopeful; check, time; shapes [(B, H, T, W)]; G key heads; docs: tokens per document; window_py: the portable kernels.
"""


def jobs():
    run = []
    for dim in (64, 128):
        run.append({"kind": "fwd", "D": dim, "tiles": None})
        run.append({"kind": "bwd", "D": dim, "dq_plan": None, "dkv_plan": None})
    for dim in (64, 128):
        run.append({"kind": "fwd", "D": dim, "tiles": None, "bounded": True, "time": False})
        run.append({"kind": "bwd", "D": dim, "dq_plan": None, "dkv_plan": None, "bounded": True, "time": False})
        run.append({"kind": "fwd", "D": dim, "tiles": None, "gated": False})
        run.append({"kind": "bwd", "D": dim, "dq_plan": None, "dkv_plan": None, "gated": False})
    return run
