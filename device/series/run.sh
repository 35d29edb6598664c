#!/bin/bash
# Series on one H200 (16 cores): bash .gpu-series/run.sh LIMIT_SECONDS
# Order: forecasts per second on the bare card (and, on a core of its own, on the CPU); peers of ETTh1 and ETTm1 (4
# mixers x 3 seeds), then of M4; grids on validation alone, combinations of what helped, and the chosen settings with 3
# seeds on the test split. Everything is a line of $OUT/series.jsonl, bench.jsonl or grid.jsonl as soon as it is there.
# A second call on the same machine goes on where the first was cut (/tmp/series keeps all files).
# Tiny form: STEPS=20 JOBS=2 STRIDE=400 SEEDS=0 TRIES=2 bash .gpu-series/run.sh 300
set -u
limit=${1:-570}; began=$SECONDS
left() { echo $((limit - 15 - (SECONDS - began))); }
OUT=${OUT:-/tmp/series-out}; keep=${KEEP:-/tmp/series}; here=.gpu-series
mkdir -p "$OUT" "$keep"
exec > >(tee -a "$keep/log.txt") 2>&1
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 ZOO_COMMIT=${ZOO_COMMIT:-$(cat $here/commit)}
if [ -e .gpu-wheels ] && [ ! -e /tmp/site/.ready ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu-wheels/*.whl 2>&1 | tail -2
  touch /tmp/site/.ready
fi
export PYTHONPATH=$PWD:/tmp/site${PYTHONPATH:+:$PYTHONPATH}
if [ -e $here/data.tar.xz ] && [ ! -e "$keep/data/m4" ]; then mkdir -p "$keep/data"; tar -C "$keep/data" -xJf $here/data.tar.xz; fi
[ -e "$keep/data/m4" ] && export ZOO_DATA=$keep/data
py=${PYTHON:-python3}
back() { cp "$keep"/*.jsonl "$keep"/log.txt "$OUT"/ 2>/dev/null; tail -n +1 "$keep"/{etth1,ettm1,m4,search_*}.txt > "$OUT/tables.txt" 2>/dev/null; } # 5 files
trap back EXIT
( while sleep 5; do back; done ) & copier=$!
timed() { local t=$(left); [ "$t" -gt 5 ] || return 1; timeout "$t" "$@"; }
jobs=${JOBS:-14}; steps=${STEPS:+train.steps=$STEPS train.eval_every=$STEPS}; seeds=${SEEDS:-0 1 2}
stride=${STRIDE:+task.stride=$STRIDE}
echo "== $(date +%T) commit $ZOO_COMMIT, $(nproc) cores, $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || echo no card)"

if [ ! -e "$keep/bench.done" ]; then
  if command -v nvidia-smi >/dev/null; then
    ( CUDA_VISIBLE_DEVICES= timeout "$(left)" $py scripts/bench_forecasts.py ${BENCH_CPU:---rounds 3} >> "$keep/bench.jsonl" 2>"$keep/bench_cpu.txt" ) &
  fi
  timed $py scripts/bench_forecasts.py ${BENCH:-} | tee -a "$keep/bench.jsonl" && touch "$keep/bench.done"
fi
echo "== $(date +%T) forecasts per second are in, $(left) s left"

peers() { # RECIPE JOBS "training words" "scoring words" [more]
  timed $py scripts/series_peers.py "$1" $3 --evaluate task.linear=false $4 --jobs "$2" --seeds $seeds --out "$keep/series.jsonl" "${@:5}"
}
a=$((jobs / 2)); b=$((jobs - a)); [ $a -ge 1 ] || a=1
peers series/etth1 $a "$steps $stride" "${stride:-task.stride=1}" --name as-published > "$keep/etth1.txt" 2>&1 &
one=$!
peers series/ettm1 $b "$steps ${stride:-task.stride=8}" "${stride:-task.stride=1}" --name as-published > "$keep/ettm1.txt" 2>&1 &
two=$!
wait $one $two; tail -n 5 "$keep/etth1.txt" "$keep/ettm1.txt"
peers series/m4_hourly "$jobs" "$steps task.dataset.hold_out=0" "" --name as-published > "$keep/m4.txt" 2>&1; tail -n 5 "$keep/m4.txt"
echo "== $(date +%T) peers are in, $(left) s left"

# -- choices on validation alone; nothing below reads a test split until a setting is chosen ---------------------------
ett=("task.calendar=true" "task.patch=12" "task.patch=48" "task.predict=96" "task.predict=384 task.ahead=0"
  "train.optimizer.lr=3e-4" "train.optimizer.lr=1e-3" "model.backbone.dropout=0.1" "model.backbone.dropout=0.35" "model.head.dropout=0.1"
  "model.head.dropout=0.5" "model.head.level=last" "model.head.level=mean" "model.head.hidden=256" "model.head.output.mean=3.0"
  "model.head.statistics=running" "train.optimizer.weight_decay=0.5" "model.backbone.mixer.gate_bias=4.0" "model.backbone.depth=4"
  "model.backbone.width=128" "model.backbone.depth=1" "task.ahead=2" "train.batch_size=256" "train.ema=0.99" "task.channels=mixed")
etth=("${ett[@]/task.patch=12/task.patch=8}"); etth=("${etth[@]/task.patch=48/task.patch=32}"); etth=("${etth[@]/task.predict=96/task.predict=192}") # 512 and 96 divide by these
m4=("train.steps=1000" "train.steps=300" "train.optimizer.lr=1e-3" "train.optimizer.lr=4e-3" "model.backbone.dropout=0.2" "model.backbone.dropout=0.0"
  "model.head.dropout=0.0" "model.head.dropout=0.2" "model.head.units=data" "model.head.lags=[24,168]" "model.head.lags=[24,168,336]"
  "task.patch=12 model.head.prefix=14" "task.patch=48 model.head.prefix=4" "task.context=504 model.head.lags=[24,48,168,336,504]" "model.backbone.width=128"
  "model.backbone.depth=4" "model.head.highway=168" "model.head.highway=336" "model.head.highway=336 model.head.level=last" "model.head.hidden=256" "train.optimizer.weight_decay=0.3"
  "model.backbone.mixer.gate_bias=4.0" "train.batch_size=256" "train.ema=0.99" "model.head.statistics=prefix")
grid() { # RECIPE BY JOBS SHARED SEEDS TRIES...
  local words=(); for t in "${@:6}"; do words+=(--try "$t"); done
  timed $py scripts/series_grid.py "$1" $4 --by "$2" --jobs "$3" --seeds "$5" --out "$keep/grid.jsonl" "${words[@]}"
}
search() { # RECIPE BY JOBS "shared words" "final training words" "final scoring words" TRIES...
  local name=${1#*/}
  grid "$1" "$2" "$3" "$4" "${GRID_SEEDS:-0,1}" "${@:7}" || return
  mapfile -t combined < <($py $here/choose.py "$keep/grid.jsonl" "$1" combine 4)
  [ ${#combined[@]} -gt 0 ] && { grid "$1" "$2" "$3" "$4" "${GRID_SEEDS:-0,1}" "${combined[@]}" || return; }
  local chosen; chosen=$($py $here/choose.py "$keep/grid.jsonl" "$1" best)
  echo "$1 chosen on validation: ${chosen:-(as it is)}"
  [ -n "$chosen" ] && peers "$1" 3 "$5 $chosen" "$6" --mixers gatedfwa --name "chosen: $chosen"
}
n=${TRIES:-99}; third=$((jobs / 3)); [ $third -ge 1 ] || third=1
search series/ettm1 mse $((third + 2)) "$steps ${stride:-task.stride=8}" "$steps ${stride:-task.stride=8}" "${stride:-task.stride=1}" "${ett[@]:0:$n}" > "$keep/search_ettm1.txt" 2>&1 &
one=$!
search series/m4_hourly mase $third "$steps task.dataset.hold_out=192 task.stride=24" "$steps task.dataset.hold_out=0" "" "${m4[@]:0:$n}" > "$keep/search_m4.txt" 2>&1 &
two=$!
search series/etth1 mse $third "$steps $stride" "$steps $stride" "${stride:-task.stride=1}" "${etth[@]:0:$n}" > "$keep/search_etth1.txt" 2>&1 &
wait $one $two $!
kill $copier; tail -n 25 "$keep"/search_*.txt
echo "== $(date +%T) done, $(left) s left"
