# Call A, 590 s, with FlashAttention-4's second half: every GPU test, bench_nsa at group 16 with the card to itself, then
# `zoo bench kernels` in a session of its own, which goes on through call B (a call's own processes are killed at its end)
. .gpu-l3/common.sh
ls .gpu-cache*/cache.* 2>/dev/null && { mkdir -p ~/.triton; cat .gpu-cache*/cache.* | tar xJ -C ~/.triton; say cache; }  # of an earlier lease, carried
( cat /tmp/cu13.part.a .gpu-fa4b/cu13.part.b | tar xJ -C /tmp/cu13 && cp -r /tmp/cu13/nvidia_cutlass_dsl /tmp/site/ && timeout 200 python3 .gpu-l3/fa4_ahead.py > $OUT/fa4_ahead.log 2>&1; say fa4 $? ) &
timeout 440 $T tests -n 15 --dist worksteal --junitxml=$OUT/junit.xml > $OUT/tests.log 2>&1; say tests $?; tail -8 $OUT/tests.log; failed; wait
timeout 230 python3 scripts/bench_nsa.py --untested --only speed crossover --groups 16 > $OUT/nsa.log 2> $OUT/nsa.err; say nsa $?; cat $OUT/nsa.log
setsid nohup python3 -m zoo.cli bench kernels --out $OUT/k > $OUT/kernels.log 2>&1 < /dev/null & echo $! > /tmp/kernels.pid
while [ $((SECONDS - t0)) -lt 575 ] && kill -0 $(cat /tmp/kernels.pid) 2>/dev/null; do sleep 2; done; say kernels so far; wc -l $OUT/k/bench.csv 2>/dev/null
