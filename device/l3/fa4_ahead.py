import torch
from flash_attn.cute import flash_attn_func
for shape in ((1, 4096, 64, 4), (1, 4096, 64, 16), (1, 4096, 64, 64)):
    b, t, h, g = shape
    q, k, v = (torch.randn(b, t, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (h, g, g))
    out = flash_attn_func(q, k, v, causal=True); out = out[0] if isinstance(out, tuple) else out
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out)); torch.cuda.synchronize(); print("fa4", shape, flush=True)
    with torch.no_grad():
        flash_attn_func(q, k, v, causal=True); torch.cuda.synchronize()
