"""The hopeful pass in plain torch: fp32 logits and sums, bf16 probabilities, one reference for rows 8 apart. Which rows it
marks, and how far the others are from float64."""
import torch, math, sys
def bf(x): return x.bfloat16().float()
def hopeful(q, k, v, decay, window, pairs=True):
    """q (T,D) ... one head; T a multiple of 64. Returns out, lse (log2), bad."""
    T, D = q.shape; c = D**-.5 * 1.4426950408889634
    U = (decay.double()*1.4426950408889634).cumsum(0)
    out = torch.zeros(T, D); lse = torch.zeros(T); bad = torch.zeros(T, dtype=torch.bool)
    for t0 in range(0, T, 64):
        item_end = min((t0 // 192 + 1) * 192, T)  # anchor: end of the item's newest chunk
        anchor = U[min((item_end + 127) // 128 * 128, T) - 1]
        bias = ((anchor - U).float() / c)
        rows = slice(t0, t0 + 64); pos = torch.arange(t0, t0 + 64)
        m = None; total = torch.zeros(64); o = torch.zeros(64, D)
        for k0 in range(t0, max(0, t0 - window + 1) // 64 * 64 - 1, -64):
            key = torch.arange(k0, k0 + 64)
            s = q[rows] @ k[k0:k0+64].T
            seen = (key[None] <= pos[:, None]) & (key[None] > pos[:, None] - window)
            if m is None:
                x = ((s + bias[k0:k0+64]) * c).masked_fill(~seen, -math.inf)
                m = x.amax(1)
                if pairs:
                    p2 = m.view(4, 2, 8); mid = .5 * (p2.amax(1) + p2.amin(1)); m = mid[:, None].expand(4, 2, 8).reshape(64)
                e = torch.exp2(x - m[:, None])
            else:
                s = s.masked_fill(~seen, -math.inf)
                e = torch.exp2(s * c + (bias[k0:k0+64][None] * c - m[:, None]))
            e = torch.where(e < 2.0**-126, 0., e)
            total += e.sum(1); o += bf(e) @ v[k0:k0+64]
        out[rows] = o / total[:, None]; lse[rows] = (m.double() + total.double().log2() - (anchor - U[rows])).float()
        bad[rows] = ~((total < 2.0**64) & (total > 2.0**-64))
    return out, lse, bad
def exact(q, k, v, decay, window):
    T, D = q.shape; q, k, v = q.double(), k.double(), v.double(); U = decay.double().cumsum(0); t = torch.arange(T)
    s = q @ k.T * D**-.5 + U[:, None] - U[None]
    s = s.masked_fill((t[None] > t[:, None]) | (t[None] <= t[:, None] - window), -math.inf)
    l = s.logsumexp(1); return (s - l[:, None]).exp() @ v, l / math.log(2)
if __name__ == "__main__":
    torch.manual_seed(0); T, D = 1152, 64
    print("gate nats a token, logits' std nats: share of spoiled rows, of spoiled items of 192; error of the others (out, lse in nats); row-by-row reference's spoiled rows")
    for std in (1, 5, 20, 150):
        for name, decay in [(f"{g}", -g * 2 * torch.rand(T)) for g in (0, .1, .7, 2, 5, 8, 12, 20)] + [("resets -60", torch.where(torch.rand(T) < .03, -60., -.1 * torch.rand(T))), ("resets -120", torch.where(torch.rand(T) < .03, -120., -.1 * torch.rand(T)))]:
            q, k, v = (bf(torch.randn(T, D)) for _ in range(3)); q = bf(q * std)
            o, l, bad = hopeful(q, k, v, decay, 512); _, _, b1 = hopeful(q, k, v, decay, 512, pairs=False)
            O, L = exact(q, k, v, decay, 512); g = ~bad
            eo = ((o.double() - O)[g].abs().max() / O.abs().max()).item() if g.any() else -1
            el = ((l.double() - L)[g].abs().max() * math.log(2)).item() if g.any() else -1
            print(f"{name:>12} std {std:4}: rows {bad.float().mean():.3f} items {bad.view(-1,192).any(1).float().mean():.2f} out {eo:.1e} lse {el:.1e}  row-wise {b1.float().mean():.3f}", flush=True)
