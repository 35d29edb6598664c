set -u
. .gpu-l2/env.sh
export PYTHONPATH=$PYTHONPATH:$PWD/.gpu-l2
t0=$SECONDS; say() { echo "[$((SECONDS - t0))] $*"; }
T="python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark -p failures --tb=short"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; nproc
( timeout 150 python3 scripts/bench_train.py --curves gatedfwa+narrow gatedfwa+narrow+reference --tokens 1024 --budget 16384 --limit 140 > $OUT/curves.log 2>&1; say curves >> $OUT/curves.log ) &
curves=$!
( timeout 130 python3 .gpu-l2/ab_gate.py base=.gpu-l2/trees/base row=.gpu-l2/trees/row new=.gpu-l2/trees/new --check row,new --rounds 0 > $OUT/ab_check.log 2>&1; say ab check $? >> $OUT/ab_check.log ) &
check=$!
timeout 150 $T tests/ops/test_nsa_gpu.py tests/ops/test_block_gpu.py -n 8 > $OUT/tests_nsa.log 2>&1; say tests nsa $?; tail -4 $OUT/tests_nsa.log; grep -a "^===\|Error" $OUT/failures.txt 2>/dev/null | cut -c1-200 | head -20
wait $check; tail -25 $OUT/ab_check.log
wait $curves; say curves; cut -c1-600 $OUT/curves.log
( timeout 240 python3 .gpu-l2/nsa_ahead.py > $OUT/nsa_ahead.log 2>&1; say nsa ahead >> $OUT/nsa_ahead.log ) &
ahead=$!
B="python3 scripts/bench_train.py"
timeout 150 $B --arms gatedfwa+narrow+graph sdpa flex --tokens 16384 --limit 60 2>&1 | tee -a $OUT/train.log; say train 16384
timeout 80 $B --arms gatedfwa+narrow --tokens 1048576 --budget 1048576 --micro 1 --steps 4 --limit 78 2>&1 | tee -a $OUT/train.log; say 1M
wait $ahead; tail -3 $OUT/nsa_ahead.log
timeout 110 python3 .gpu-l2/ab_gate.py base=.gpu-l2/trees/base row=.gpu-l2/trees/row new=.gpu-l2/trees/new --check none --rounds 3 --only 1,2,3,4 > $OUT/ab_time.log 2>&1; say ab $?; tail -60 $OUT/ab_time.log
timeout 75 python3 scripts/bench_nsa.py --untested --groups 16 > $OUT/nsa.log 2> $OUT/nsa.err; say nsa $?; cat $OUT/nsa.log
for n in 4096 16384; do timeout 100 $B --arms gatedfwa_nsa-wide+narrow+graph fla_nsa --tokens $n --limit 55 2>&1 | tee -a $OUT/train.log; say nsa train $n; done
