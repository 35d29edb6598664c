# Call D, 470 s, chained to B: curves beside the warming of each arm, then arms one by one, then a step of 1M tokens
THREADS=3; . .gpu-l3/common.sh
pkill -f 'zoo[.]bench'; pkill -f 'zoo[.]cli bench'
( timeout 260 python3 scripts/bench_train.py --tokens 1024 --budget 16384 --limit 250 --curves gatedfwa+narrow gatedfwa+narrow+reference+eager gatedfwa+reference+eager+fp32 > $OUT/curves.log 2>&1; say curves $?; tail -7 $OUT/curves.log ) &
for t in 4096 16384; do for arm in gatedfwa+narrow+graph sdpa flex; do
  ( timeout 150 python3 scripts/bench_train.py --arms $arm --tokens $t --steps 12 --limit 148 > $OUT/warm_$arm.$t.log 2>&1 ) & done; done
( timeout 150 python3 scripts/bench_train.py --arms gatedfwa+narrow --tokens 1048576 --budget 1048576 --micro 1 --steps 2 --limit 148 > $OUT/warm_1m.log 2>&1 ) & wait; say warm
for t in 4096 16384; do timeout 130 python3 scripts/bench_train.py --arms gatedfwa+narrow+graph sdpa flex --tokens $t --steps 30 --limit 60 2>&1 | tee -a $OUT/train.log; done; say train
timeout 100 python3 scripts/bench_train.py --arms gatedfwa+narrow --tokens 1048576 --budget 1048576 --micro 1 --steps 4 --limit 95 2>&1 | tee -a $OUT/train.log; say 1m
# what was compiled, for the next lease's tests (unpack: cat .gpu-cache*/cache.* | tar xJ -C ~/.triton): 60 MiB come back at most
mkdir -p /tmp/cache-out; (cd ~/.triton && find cache \( -name '*.cubin' -o -name '*.json' -o -name '*.so' \) | tar cf - -T - | xz -T16 -1 | split -b 15M - /tmp/cache-out/cache.); ls -la /tmp/cache-out | head; [ "$(ls /tmp/cache-out | wc -l)" -le 3 ] || rm /tmp/cache-out/*; say cache
