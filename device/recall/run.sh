#!/usr/bin/env bash
# On the GPU machine, in the repository's root:
#   bash .gpu-recall/run.sh recall|text|text-more|speed SECONDS [further words of zoo evaluate: --only …, train.steps=…]
# Rows go to $OUT/<suite>.jsonl as they are measured; those in .gpu-recall/rows are not measured again. What is left
# 15 s before SECONDS is ended. $OUT: <suite>.jsonl, run.log, gpu.csv, logs.tar.xz (every cell's log).
# PYTHON: another python3; JOBS: cells at once
set -uo pipefail
set -m # each background job a process group of its own, so that all of it can be ended
began=$SECONDS part=$1 limit=$2
shift 2
here=.gpu-recall python=${PYTHON:-python3}
mkdir -p "$OUT" docs/results
past() { echo $((SECONDS - began)); }
left() { echo $((limit - 15 - (SECONDS - began))); }
say() { echo "[$(past)] $*" | tee -a "$OUT/run.log"; }

if [ ! -e /tmp/site/.ready ] && [ -d .gpu-wheels ]; then
    $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu-wheels/*.whl
    touch /tmp/site/.ready
fi
if [ ! -e /tmp/zoo-data/.ready ] && [ "$part" != recall ]; then
    mkdir -p /tmp/zoo-data && tar -C /tmp/zoo-data -xf "$here/text.tar.xz" && touch /tmp/zoo-data/.ready
fi
export PYTHONPATH=$PWD:/tmp/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 ZOO_DATA=/tmp/zoo-data
ZOO_COMMIT=$(cat "$here/commit")
[ "$(cat "$here/tree")" = "$(cat $(find zoo tasks configs -type f -not -name '*.pyc' | LC_ALL=C sort) | sha256sum)" ] || { echo "pack.sh was run on another tree"; exit 3; }
export ZOO_COMMIT OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=3
cp -n "$here"/rows/*.jsonl docs/results/ 2> /dev/null
zoo="$python -m zoo.cli"

keep() { # rows so far; a suite writes whole files, so that there is never half of one
    for rows in docs/results/*.jsonl; do [ -e "$rows" ] && cp "$rows" "$OUT/"; done
}
watched() { # run words, keep its rows every 3 s, end it where the time is up
    "$@" >> "$OUT/run.log" 2>&1 &
    local job=$!
    while kill -0 $job 2> /dev/null; do
        keep
        if [ "$(left)" -le 0 ]; then
            say "time is up"
            kill -TERM -- -$job
            for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 $job 2> /dev/null || break; sleep 1; done
            kill -KILL -- -$job 2> /dev/null
            break
        fi
        sleep 3
    done
    wait $job
    local code=$?
    keep
    say "$1 … ended with $code"
    return $code
}
finish() {
    keep
    [ -n "${smi:-}" ] && kill -TERM -- -"$smi" 2> /dev/null
    find runs/suites -name log.txt -print0 2> /dev/null | tar --null -T - -cJf "$OUT/logs.tar.xz" 2> /dev/null
    wc -l "$OUT"/*.jsonl 2> /dev/null
    tail -n 40 "$OUT/run.log" | cut -c1-300
    for log in $(find runs/suites -name log.txt -newer "$OUT/started" 2> /dev/null | head -20); do
        echo "-- $log: $(tail -n 1 "$log" | cut -c1-200)"
    done
    rm -f "$OUT/started"
}
trap finish EXIT
touch "$OUT/started"
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=timestamp,name,utilization.gpu,memory.used --format=csv,noheader -l 5 > "$OUT/gpu.csv" &
    smi=$!
fi

again() { # a row that is deleted comes back alone: the last accuracy of a cell whose runs are there still (on request: AGAIN=1)
    $python - "$1" << 'P'
import json, sys
from pathlib import Path
path = Path(f"docs/results/{sys.argv[1]}.jsonl")
lines = path.read_text().splitlines()
Path("/tmp/before.jsonl").write_text("\n".join(lines) + "\n")
at = max(i for i, line in enumerate(lines) if (row := json.loads(line))["measurement"] == "scores" and Path("runs/suites", sys.argv[1], row["experiment"]).is_dir())
row = json.loads(lines[at])
path.write_text("".join(line + "\n" for i, line in enumerate(lines) if i != at))
Path("/tmp/cell").write_text("/".join(filter(None, (row["experiment"], row["model"], row["arm"]))))
print("deleted:", json.dumps({k: row[k] for k in ("experiment", "model", "arm", "lr", "seed", "name", "at", "value")}))
P
    watched $zoo evaluate "$1" --out docs/results --jobs 1 --only "$(cat /tmp/cell)" "${@:2}"
    diff /tmp/before.jsonl "docs/results/$1.jsonl" | cut -c1-330 | tee -a "$OUT/run.log"
    [ "$(wc -l < "docs/results/$1.jsonl")" -ge "$(wc -l < /tmp/before.jsonl)" ] || cp /tmp/before.jsonl "docs/results/$1.jsonl" # nothing is lost
    keep
    say "again: $(wc -l < /tmp/before.jsonl) rows before, $(wc -l < "docs/results/$1.jsonl") after"
}

case $part in
recall) # the longest first; by ONLY parts of it: "calibration*" "gated*" "sparse*" "lengths/*", then "lengths-shift*"
    only=()
    for pattern in ${ONLY:-}; do only+=(--only "$pattern"); done
    watched $zoo evaluate recall --out docs/results --jobs "${JOBS:-12}" "${only[@]}" "$@"
    [ -n "${AGAIN:-}" ] && [ "$(left)" -gt 45 ] && again recall "$@"
    ;;
text)
    export TORCHINDUCTOR_COMPILE_THREADS=2
    mixers=()
    for mixer in softmax swa fox gatedfwa; do mixers+=(--only "text-*/text_${mixer}_8m"); done
    watched $zoo evaluate cross_domain --out docs/results --jobs "${JOBS:-8}" "${mixers[@]}" "$@"
    ;;
text-more)
    export TORCHINDUCTOR_COMPILE_THREADS=2
    mixers=()
    for mixer in baseconv nsa gatedfwa_nsa; do mixers+=(--only "text-*/text_${mixer}_8m"); done
    watched $zoo evaluate cross_domain --out docs/results --jobs "${JOBS:-6}" "${mixers[@]}" "$@"
    ;;
speed) # first every model compiles, all at once, into the caches; these rates are thrown away. Then one alone
    if [ -z "${COLD:-}" ]; then
        mkdir -p /tmp/warm
        sed 's/^    lengths: .*/    lengths: [1024, 65536]/' configs/suites/speed.yaml > /tmp/warm/speed.yaml
        jobs=()
        for mixer in softmax swa fox gatedfwa nsa gatedfwa_nsa baseconv; do
            timeout $((limit / 3)) $zoo evaluate /tmp/warm/speed.yaml --only "text_${mixer}_8m" --out "/tmp/warm/$mixer" \
                > "/tmp/warm/$mixer.log" 2>&1 &
            jobs+=($!)
            sleep 1
        done
        wait "${jobs[@]}"
        say "warm: $(cat /tmp/warm/*/speed.jsonl 2> /dev/null | wc -l) rates; $(grep -hi "failed" /tmp/warm/*.log | head -5 | cut -c1-200)"
    fi
    export TORCHINDUCTOR_COMPILE_THREADS=14
    for mixer in softmax swa fox gatedfwa nsa gatedfwa_nsa baseconv; do
        [ "$(left)" -gt 20 ] && watched $zoo evaluate speed --out docs/results --jobs 1 --only "text_${mixer}_8m" "$@"
    done
    ;;
*)
    echo "unknown part $part: recall, text, text-more, speed"
    exit 2
    ;;
esac
