# One H200, ~590 s: every GPU test, NSA's table, loss curves, fla's NSA beside ours at T 4096. (Folder .gpu-l3 as prepare.sh makes it,
# with env.sh, failures.py, nsa_ahead.py of ../l3; run as: bash .gpu-l3/go.sh 585 with this file as .gpu-l3/run.sh)
set -u
. .gpu-l3/env.sh
export PYTHONPATH=$PYTHONPATH:$PWD/.gpu-l3
t0=$SECONDS; say() { echo "[$((SECONDS - t0))] $*"; }
T="python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark -p failures --tb=short --durations=15 --timeout 150"
( timeout 240 python3 .gpu-l3/nsa_ahead.py > $OUT/nsa_ahead.log 2>&1 ) &
ahead=$!
timeout 260 $T tests -n 14 > $OUT/tests.log 2>&1; say tests $?; tail -20 $OUT/tests.log; grep -a "^===\|Error" $OUT/failures.txt 2>/dev/null | cut -c1-180 | head -20
wait $ahead
timeout 75 python3 scripts/bench_nsa.py --untested --only speed --groups 16 > $OUT/nsa16.log 2> $OUT/nsa16.err; say nsa16 $?; cat $OUT/nsa16.log; grep -a "^    " $OUT/nsa16.err | tail -30; mv $OUT/bench_nsa.json $OUT/bench_nsa16.json
timeout 60 python3 scripts/bench_nsa.py --untested --only speed --groups 4 1 > $OUT/nsa41.log 2> $OUT/nsa41.err; say nsa41 $?; cat $OUT/nsa41.log; mv $OUT/bench_nsa.json $OUT/bench_nsa41.json
timeout 80 python3 scripts/bench_train.py --curves gatedfwa+narrow gatedfwa+narrow+reference+eager --tokens 1024 --budget 16384 --limit 78 2>&1 | tee $OUT/curves.log | cut -c1-700; say curves
timeout 160 python3 scripts/bench_train.py --arms gatedfwa_nsa-wide+narrow+graph fla_nsa --tokens 4096 --limit 80 2>&1 | tee -a $OUT/train.log; say nsa train 4096
