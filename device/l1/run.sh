set -u
. .gpu-l1/env.sh
nvidia-smi --query-gpu=index,name,driver_version --format=csv,noheader; nproc
python3 - <<'P' || true
import torch
try:
    from flash_attn.cute import flash_attn_func
    q = torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16)
    print("FA4", flash_attn_func(q, q, q, causal=True, window_size=(127, 0))[0].float().std())
except Exception as e: print("FA4 fails", repr(e)[:400])
P
mkdir -p $OUT/k
( CUDA_VISIBLE_DEVICES=0 OUT=$OUT/k timeout ${1:-560} python3 .gpu-l1/lane0.py > $OUT/lane0.log 2>&1; echo lane0 $? >> $OUT/lane0.log ) &
( CUDA_VISIBLE_DEVICES=1 timeout ${1:-560} bash .gpu-l1/lane1.sh > $OUT/lane1.log 2>&1; echo lane1 $? >> $OUT/lane1.log ) &
wait
cd $OUT; tail -c 5500 lane0.log; echo; echo =====; tail -c 6000 lane1.log
tar cJf all.tar.xz --exclude=all.tar.xz . ; mkdir -p /tmp/keep; cp all.tar.xz /tmp/keep; find . -mindepth 1 -not -name all.tar.xz -not -path ./k -delete 2>/dev/null; ls -la
