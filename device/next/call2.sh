# ~590 s: the command itself, then fla's NSA beside ours at T 16384, forecasts a second. A card that nobody else uses.
set -u
. .gpu-l3/env.sh
export PYTHONPATH=$PYTHONPATH:$PWD/.gpu-l3
t0=$SECONDS; say() { echo "[$((SECONDS - t0))] $*"; }
timeout 420 python3 -m zoo.cli bench kernels --out $OUT/k > $OUT/kernels.log 2>&1; say kernels $?; tail -c 6000 $OUT/kernels.log
timeout 165 python3 scripts/bench_train.py --arms gatedfwa_nsa-wide+narrow+graph fla_nsa --tokens 16384 --limit 80 2>&1 | tee -a $OUT/train.log; say nsa train 16384
