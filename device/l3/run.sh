# tests of the kernels on the final tree, then NSA's table, then what time is left
set -u
. .gpu-l3/env.sh
export PYTHONPATH=$PYTHONPATH:$PWD/.gpu-l3
t0=$SECONDS; say() { echo "[$((SECONDS - t0))] $*"; }
T="python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark -p failures --tb=short --durations=8 --timeout 120"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; nproc
timeout 60 $T tests/ops/test_nsa_gpu.py -k "far or near" -n 10 > $OUT/tests_near.log 2>&1; say tests near far $?; tail -3 $OUT/tests_near.log
if grep -qa "=== .*far_blocks" $OUT/failures.txt 2>/dev/null; then say FALLBACK; export PYTHONPATH=$PWD/.gpu-l3/fallback:$PYTHONPATH; fi
timeout 150 $T tests/ops/test_nsa_gpu.py tests/ops/test_gpu.py tests/ops/test_block_gpu.py -k "not far and not near" -n 14 > $OUT/tests.log 2>&1; say tests $?; tail -14 $OUT/tests.log; grep -a "^===\|Error" $OUT/failures.txt 2>/dev/null | cut -c1-180 | head -20
timeout 100 python3 scripts/bench_nsa.py --untested --only speed --groups 16 > $OUT/nsa16.log 2> $OUT/nsa16.err; say nsa16 $?; cat $OUT/nsa16.log; grep -a "^    " $OUT/nsa16.err | tail -30; mv $OUT/bench_nsa.json $OUT/bench_nsa16.json
timeout 75 python3 scripts/bench_train.py --arms gatedfwa+narrow --tokens 1048576 --budget 1048576 --micro 1 --steps 4 --limit 73 2>&1 | tee -a $OUT/train.log; say 1M
timeout 45 python3 scripts/bench_nsa.py --untested --only crossover --groups 16 > $OUT/cross.log 2> $OUT/cross.err; say cross $?; cat $OUT/cross.log; mv $OUT/bench_nsa.json $OUT/bench_nsa_cross.json
timeout 25 python3 scripts/bench_nsa.py --untested --only decode --groups 16 > $OUT/decode.log 2> $OUT/decode.err; say decode $?; cat $OUT/decode.log; mv $OUT/bench_nsa.json $OUT/bench_nsa_decode.json
timeout 60 python3 scripts/bench_nsa.py --untested --only speed --groups 4 1 > $OUT/nsa41.log 2> $OUT/nsa41.err; say nsa41 $?; cat $OUT/nsa41.log; mv $OUT/bench_nsa.json $OUT/bench_nsa41.json
