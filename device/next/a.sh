# Call A, 590 s: the trap alone (20 s), every GPU test (290 s with cold caches), then `zoo bench kernels` in a session of
# its own, which goes on through call B (a call's own processes are killed when it returns)
. .gpu-l3/common.sh
timeout 60 $T -p trap_random "tests/train/test_graph.py::test_on_a_gpu_a_recorded_run_resumes" > $OUT/trap.log 2>&1; say trap $?; mv $OUT/failures.txt $OUT/trap_failures.txt 2>/dev/null; grep -a -A70 "^=== getrandbits" $OUT/random.txt | cut -c1-150
( timeout 250 python3 .gpu-l3/block_ratio.py > $OUT/ratio.log 2>&1 ) &
timeout 430 $T tests -n 15 --dist worksteal --durations=10 > $OUT/tests.log 2>&1; say tests $?; tail -16 $OUT/tests.log; failed
tail -2 $OUT/ratio.log; wait
setsid nohup python3 -m zoo.cli bench kernels --out $OUT/k > $OUT/kernels.log 2>&1 < /dev/null & echo $! > /tmp/kernels.pid
while [ $((SECONDS - t0)) -lt 575 ] && kill -0 $(cat /tmp/kernels.pid) 2>/dev/null; do sleep 2; done; say kernels so far; wc -l $OUT/k/bench.csv 2>/dev/null
