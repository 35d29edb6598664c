# Call B, 590 s, chained to A (its caches): arms of training warmed all at once, then one by one; then `zoo bench kernels`
. .gpu-l3/common.sh
for t in 4096 16384; do for arm in gatedfwa_nsa-wide+narrow+graph fla_nsa; do
  ( timeout 130 python3 scripts/bench_train.py --arms $arm --tokens $t --steps 12 --limit 128 > $OUT/warm_$arm.$t.log 2>&1 ) & done; done; wait; say warm
timeout 180 python3 scripts/bench_train.py --arms gatedfwa_nsa-wide+narrow+graph fla_nsa --tokens 4096 16384 --limit 45 2>&1 | tee -a $OUT/train.log; say nsa train
timeout $((585 - SECONDS + t0)) python3 -m zoo.cli bench kernels --out $OUT/k > $OUT/kernels.log 2>&1; say kernels $?; tail -c 6000 $OUT/kernels.log
