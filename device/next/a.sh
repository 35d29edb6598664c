# Call A, 590 s: every GPU test with nothing else on the card (400 s and more), then NSA's crossover and the rest of its table
. .gpu-l3/common.sh
timeout 60 $T -p trap_random "tests/train/test_graph.py::test_on_a_gpu_a_recorded_run_resumes" tests/train/test_graph.py::test_on_a_gpu_the_first_replay_draws_what_a_step_would > $OUT/trap.log 2>&1; say trap $?; tail -3 $OUT/trap.log; head -40 $OUT/random.txt 2>/dev/null
timeout 440 $T tests -n 15 --dist worksteal --durations=25 > $OUT/tests.log 2>&1; say tests $?; tail -34 $OUT/tests.log; failed
python3 .gpu-l3/fa4_ahead.py > $OUT/fa4_ahead.log 2>&1 & python3 .gpu-l3/nsa_ahead.py > $OUT/nsa_ahead.log 2>&1; wait; say ahead
timeout $((575 - SECONDS + t0)) python3 scripts/bench_nsa.py --untested --only crossover decode --groups 16 4 1 > $OUT/cross.log 2> $OUT/cross.err; say cross $?; cat $OUT/cross.log
