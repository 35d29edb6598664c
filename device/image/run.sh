#!/bin/bash
# Images on H200s:  bash .gpu-image/run.sh "PART[@GPU] ..." LIMIT_SECONDS
#   data      only take what this call carries to /tmp/data
#   try       whole pixels: tests of a step on the card, 30 steps of the recipe; without compile or graph if need be  (~90 s)
#   cifar     raw CIFAR-10: trains for BUDGET seconds (1200 unless set), evaluates, draws; needs the card to itself
#   mnist     raw bits/dim of gatedfwa, softmax, swa; then classifier, tokenizer, codes (gatedfwa, softmax)
#   codes10   CIFAR-10 classifier, tokenizer, codes (gatedfwa, softmax, 20m), FID by own features, three guidances
#   sampling  images a second, batch 1, 16, 256; needs the card to itself
#   fetch     only bring back what there is
# One H200 is lent for 1,800 s in all, 600 s a call, and is given back after 30 s idle: calls follow one another at once. An
# order that fits one loan with BUDGET=1200:
#   pack.sh cifar_a; "data"   pack.sh cifar_b; "try" 150   then "cifar" 570 three times (1200 + about 100 to score and draw)
# and one for another loan:  pack.sh mnist; "mnist" 570 twice; then "sampling". `codes10` takes about 400 s more (a loan of its
# own, or two: what is cut goes on from its newest checkpoint only while the machine is held).
# Parts run in sessions of their own from a copy of the tree (/tmp/tree) and go on between calls of one held machine; a
# call starts those that are not there yet, waits for them or for its limit, and brings back all results so far. Runs
# lie in /tmp/runs.
set -u
parts=${1:?which parts}; limit=${2:-570}; began=$SECONDS
OUT=${OUT:-/tmp/image-out}; export KEEP=${KEEP:-/tmp/runs} DATA=${DATA:-/tmp/data}
mkdir -p "$OUT" "$KEEP/logs" "$DATA"
[ -d .gpu-image/data ] && cp -r .gpu-image/data/. "$DATA"/
if [ -e .gpu-wheels ] && [ ! -e /tmp/site/.ready ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu-wheels/*.whl 2>&1 | tail -2
  touch /tmp/site/.ready
fi
export TREE=${TREE:-/tmp/tree}
if [ ! -e "$TREE/zoo" ]; then mkdir -p "$TREE"; cp -r zoo tasks configs scripts docs tests pyproject.toml "$TREE"/; cp .gpu-image/drive.sh .gpu-image/commit "$TREE"/; fi
export ZOO_COMMIT=${ZOO_COMMIT:-$(cat "$TREE/commit" 2>/dev/null)}
[ -n "$ZOO_COMMIT" ] || { echo "no commit is known: run pack.sh first, or set ZOO_COMMIT"; exit 2; }
echo "== $(date +%T) parts: $parts; commit $ZOO_COMMIT; $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | tr '\n' ' ')"
pids=()
for word in $parts; do
  part=${word%@*}; gpu=${word#*@}; [ "$gpu" = "$word" ] && gpu=0
  case $part in data | fetch) continue ;; esac
  if [ -e "$KEEP/$part.pid" ] && kill -0 "$(cat "$KEEP/$part.pid")" 2>/dev/null; then echo "$part goes on"; else
    [ -e "$KEEP/$part.done" ] && { echo "$part is done"; continue; }
    echo "${CUDA_VISIBLE_DEVICES-$gpu}" > "$KEEP/$part.card"
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-$gpu} setsid nohup bash "$TREE/drive.sh" "$part" >> "$KEEP/logs/$part.log" 2>&1 < /dev/null &
    echo $! > "$KEEP/$part.pid"; echo "$part begins on card $gpu"
  fi
  pids+=("$(cat "$KEEP/$part.pid")")
done
bring() { # 8 files at most
  cat "$KEEP"/*/results.jsonl > "$OUT/results.jsonl" 2>/dev/null
  for run in "$KEEP"/*/; do [ -e "$run/metrics.jsonl" ] && sed "s|^{|{\"run\": \"$(basename "$run")\", |" "$run/metrics.jsonl"; done > "$OUT/curves.jsonl"
  cat "$KEEP"/*/provenance.json > "$OUT/provenance.json" 2>/dev/null
  cp "$KEEP/sampling.jsonl" "$OUT"/ 2>/dev/null
  tail -n +1 "$KEEP"/logs/*.log > "$OUT/log.txt" 2>/dev/null
  ( cd "$KEEP" && find . \( -path '*/evaluation/*' -o -path '*/samples/*' -o -name '*.png' \) -name '*.png' -print0 | tar --null -czf "$OUT/pictures.tar.gz" -T - ) 2>/dev/null
  for name in mnist mnist_codes; do [ -d "$KEEP/weights-$name" ] && [ -e "$KEEP/weights-$name/.whole" ] && tar -C "$KEEP/weights-$name" -cf "$OUT/weights-$name.tar" . 2>/dev/null; done
}
while [ $((SECONDS - began)) -lt $((limit - 25)) ]; do
  alive=0; for pid in "${pids[@]:-}"; do [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null && alive=1; done
  [ $alive = 0 ] && break
  sleep 3; [ $(((SECONDS - began) % 30)) -lt 3 ] && bring
done
bring
for word in $parts; do part=${word%@*}; [ -e "$KEEP/logs/$part.log" ] && { echo "--- $part $([ -e "$KEEP/$part.done" ] && echo done || echo "not done")"; tail -n 25 "$KEEP/logs/$part.log" | cut -c1-400; }; done
ls -la "$OUT"; echo "== $(date +%T)"
