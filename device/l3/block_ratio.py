"""Ratios to torch's steps of rms, 99.9% quantile and largest errors in tests/ops/test_block_gpu.py."""
import sys, json, torch
sys.path.insert(0, ".")
from tests.ops import test_block_gpu as t
rows = []
def record(ours, theirs, exact, name, allowed):
    e = [(x.double() - exact.double()).abs().flatten() for x in (ours, theirs)]
    rms = [float(x.square().mean().sqrt()) for x in e]
    big = [float(x.max()) for x in e]
    k = max(1, int(e[0].numel() * 0.001))
    q = [float(x.topk(k).values[-1]) for x in e]
    scale = float(exact.double().abs().max())
    r = lambda p: p[0] / p[1] if p[1] else float("nan")
    rows.append((where, name, e[0].numel(), r(rms), r(q), r(big), big[0] / scale))
t.assert_no_further = record
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for case in [*t.CASES, *t.LARGE]:
        where = f"{case.name} {dtype}"
        try: t.test_attention_inputs_are_no_further_from_float64_than_their_steps.__wrapped__(case, dtype) if hasattr(t.test_attention_inputs_are_no_further_from_float64_than_their_steps, "__wrapped__") else t.test_attention_inputs_are_no_further_from_float64_than_their_steps(case, dtype)
        except Exception as error: print(where, error)
class M:
    def setattr(self, o, n, v): setattr(o, n, v)
for gated in (True, False):
    where = f"mlp {gated}"; t.test_an_mlp_in_pieces_is_no_further_from_float64_than_in_one(gated, M())
rows.sort(key=lambda r: -r[5])
print("where name numbers rms q999 largest relative")
for r in rows[:45]: print(r[0], r[1], r[2], *(f"{x:.3g}" for x in r[3:]))
print("worst rms", max(r[3] for r in rows), "worst q999", max(r[4] for r in rows if r[2] > 20000), "worst largest of >20000", max(r[5] for r in rows if r[2] > 20000))
