# NSA, pruning, training
t0=$SECONDS; say() { echo "[$((SECONDS - t0))] $*"; }
T="python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark"
ARMS="gatedfwa+narrow+graph sdpa flex gatedfwa_nsa-wide+narrow+graph fla_nsa"
( printf '%s\n' "gatedfwa+narrow+graph 4096" "gatedfwa_nsa-wide+narrow+graph 4096" "flex 4096" "fla_nsa 4096" "sdpa 4096" "gatedfwa+narrow+graph 16384" "gatedfwa_nsa-wide+narrow+graph 16384" "flex 16384" "fla_nsa 16384" "sdpa 16384" |
  xargs -P 3 -L 1 sh -c 'python3 scripts/bench_train.py --arms $0 --tokens $1 --steps 3 --limit 200' > $OUT/ahead.log 2>&1; say ahead >> $OUT/ahead.log ) &
ahead=$!
( python3 -m zoo.cli train text/tinyshakespeare --run /tmp/runs/shakes > $OUT/shakes.log 2>&1; say shakes >> $OUT/shakes.log ) &
shakes=$!
timeout 170 $T tests/ops/test_nsa_gpu.py tests/ops/test_block_gpu.py -n 10 > $OUT/tests_nsa.log 2>&1; say tests nsa $?; tail -5 $OUT/tests_nsa.log
wait $ahead $shakes; say ahead
timeout 140 python3 scripts/bench_nsa.py --untested > $OUT/nsa.log 2>&1; say nsa $?; cat $OUT/nsa.log
timeout 60 python3 scripts/measure_pruning.py /tmp/runs/shakes --window 2048 --prune 1e-3 1e-2 --out $OUT/pruning.jsonl > $OUT/pruning.log 2>&1; say pruning $?; tail -12 $OUT/pruning.log
for n in 4096 16384; do timeout 150 python3 scripts/bench_train.py --arms $ARMS --tokens $n --limit 60 2>&1 | tee -a $OUT/train.log; say train $n; done
timeout 80 python3 scripts/bench_train.py --arms gatedfwa+narrow --tokens 1048576 --budget 1048576 --micro 1 --steps 4 2>&1 | tee -a $OUT/train.log; say 1M
( timeout 120 $T tests --ignore tests/ops -n 8 > $OUT/tests_rest.log 2>&1; say rest $?; tail -5 $OUT/tests_rest.log ) &
timeout 110 python3 scripts/bench_train.py --curves gatedfwa+narrow gatedfwa+narrow+reference --tokens 1024 --budget 16384 --limit 100 2>&1 | tee -a $OUT/train.log; say curves
wait
