#!/usr/bin/env bash
# From nothing to a language model: sets the environment up, trains text/demo for about two minutes on two cores on the
# standard library's own sources, stops it on purpose and resumes it, evaluates it and lets it write. At the end
# runs/demo/index.html shows that run and what every published model on this machine makes.
#   DEMO_RUN=DIR        where the run goes (default: a new folder under runs/)
#   DEMO_STOP_AFTER=S   seconds of training before the planned stop (default 45)
#   OMP_NUM_THREADS=1   one thread: on a machine that is busy with other work, threads that wait for each other make
#                       training many times slower than one alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
setup_seconds=$SECONDS

zoo=.venv/bin/zoo
[ -x "$zoo" ] || zoo=.venv/Scripts/zoo.exe
run=${DEMO_RUN:-runs/demo-$(date +%Y%m%d-%H%M%S)}
stop_after=${DEMO_STOP_AFTER:-45}
step() { printf '\n== %s\n' "$*"; }

cores=$(nproc 2>/dev/null || echo 1)
load=$(cut -d' ' -f1 /proc/loadavg 2>/dev/null || echo 0)
if [ -z "${OMP_NUM_THREADS:-}" ] && awk "BEGIN { exit !($load > $cores) }"; then
    echo "(this machine is busy: load $load on $cores cores. With OMP_NUM_THREADS=1 training may be many times faster)"
fi

# Training runs in the background, where a signal reaches this script at once: then training is stopped, too, and saves.
training=
leave() {
    if [ -n "$training" ]; then
        kill -TERM "$training" 2>/dev/null || true
        wait "$training" || true
    fi
    exit 130
}
trap leave INT TERM

step "train text/demo in $run, to be stopped after $stop_after s"
started=$SECONDS
"$zoo" train text/demo --run "$run" &
training=$!
while [ $((SECONDS - started)) -lt "$stop_after" ] && kill -0 "$training" 2>/dev/null; do sleep 1; done

if kill -TERM "$training" 2>/dev/null; then
    # A run that was stopped says so in its exit code: whatever it is, the next step shows that nothing is lost.
    wait "$training" || echo "(stopped on purpose; exit code $?)"
    training=
    step "resume it"
    "$zoo" train text/demo --run "$run" --resume &
    training=$!
    wait "$training"
    training=
else
    wait "$training" # finished before the planned stop, on a fast machine; or failed, and then so does this script
    training=
    echo "(finished within $stop_after s, before the planned stop: set DEMO_STOP_AFTER lower to see it resume)"
fi
train_seconds=$((SECONDS - started))

step "evaluate: bits per byte on held-out files, beside gzip -9 on the same bytes"
echo "(about 2.0 is what two minutes on two cores give: 8 is knowing nothing)"
"$zoo" evaluate "$run"

step "write"
mkdir -p "$run/samples"
"$zoo" sample "$run" --prompt "def " | tee "$run/samples/demo.txt"

step "a page of what this run and the published weights make"
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe
"$python" scripts/demo_page.py runs/demo "$run"

step "done"
cat <<EOF
set-up         $setup_seconds s
training       $train_seconds s, the stop and the second start included
run            $run
samples        $run/samples
page           runs/demo/index.html
TensorBoard    .venv/bin/tensorboard --logdir $run
EOF
