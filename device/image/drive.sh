#!/bin/bash
# One part, started by run.sh in a session of its own. Every stage leaves $KEEP/NAME.ok and is skipped when that is there.
set -u
part=$1; cd "$TREE" || exit 1
rm -f "$KEEP/$part.failed"
export PYTHONUNBUFFERED=1 PYTHONPATH=$TREE:/tmp/site ZOO_DATA=$DATA OMP_NUM_THREADS=${OMP:-4}
zoo() { ${PYTHON:-python3} -m zoo.cli "$@"; }
say() { echo "== $(date +%T) $*"; }
stage() { # NAME command...
  local name=$1; shift
  [ -e "$KEEP/$name.ok" ] && return 0
  local at=$SECONDS; say "$name: $*"
  if "$@"; then touch "$KEEP/$name.ok"; say "$name took $((SECONDS - at)) s"; else say "$name FAILED after $((SECONDS - at)) s"; touch "$KEEP/$part.failed"; return 1; fi
}
fit() { # RUN RECIPE words...: train, from the newest checkpoint if there is one
  local run=$1 recipe=$2; shift 2
  stage "$run" zoo train "$recipe" --run "$KEEP/$run" --resume ${STEPS:+train.steps=$STEPS} ${EXTRA:-} "$@"
}
score() { local run=$1; shift; stage "$run-score" zoo evaluate "$KEEP/$run" ${SCORE:-} "$@"; }
need() { # wait for files that another call carries
  local tries=0
  for file in "$@"; do while [ ! -e "$DATA/$file" ]; do [ $((tries++)) -gt 400 ] && { say "$DATA/$file is not there"; fail; }; sleep 3; done; done
}
judged() { echo "task.classifier=$KEEP/$1_classifier"; }
alone() { # refuses to run beside another part on the same card
  local other name
  for other in "$KEEP"/*.pid; do
    name=$(basename "$other" .pid)
    [ "$name" = "$part" ] && continue
    [ "$(cat "$KEEP/$name.card" 2>/dev/null)" = "$(cat "$KEEP/$part.card" 2>/dev/null)" ] || continue
    if kill -0 "$(cat "$other")" 2>/dev/null; then say "$part needs its card to itself; $name runs there"; fail; fi
  done
}
fail() { touch "$KEEP/$part.failed"; exit 1; }
codes() { # SET MIXER SIZE words...
  local set=$1 mixer=$2 size=$3 window=(); shift 3
  [ "$mixer" = gatedfwa ] || window=(model=image_${mixer}_$size model.backbone.mixer.name=$mixer)
  fit "${set}_codes-$mixer" "image/${set}_codes" "task.tokenizer=$KEEP/${set}_tokenizer" "task.samples.classifier=$KEEP/${set}_classifier" ${EXTRA_LM:-} ${EXTRA_CODES:-} "$@" "${window[@]}" &&
    score "${set}_codes-$mixer" && for guidance in 1.0 2.5; do
      stage "${set}_codes-$mixer-guidance-$guidance" zoo evaluate "$KEEP/${set}_codes-$mixer" ${SCORE:-} "task.samples.guidance=$guidance" || return 1
    done
}
judge() { fit "$1_classifier" "image/$1_classifier" && score "$1_classifier"; }
tokenise() { fit "$1_tokenizer" "image/$1_tokenizer" "$(judged "$1")" && score "$1_tokenizer"; }
weights() { # RUN TAG
  stage "weights-$2" zoo publish "$KEEP/$1" --tag "$2" --about "docs/cards/image.$2.yaml" --out "$KEEP/weights-$2" --table "$KEEP/weights-$2/weights.yaml" --batch-size 200 && touch "$KEEP/weights-$2/.whole"
}

case $part in
mnist)
  need mnist/train-images-idx3-ubyte.gz mnist/t10k-labels-idx1-ubyte.gz
  raw() { fit "mnist-$1" image/mnist train.save_every=1000 ${EXTRA_LM:-} "${@:2}" && score "mnist-$1" --batch-size 200; }
  # one after another: side by side on one card they would take as long, and none would be whole if time ran out
  raw gatedfwa && stage mnist-digits zoo sample "$KEEP/mnist-gatedfwa" --count 64 --out "$KEEP/mnist-gatedfwa/digits.png" --seed 0 && weights mnist-gatedfwa mnist
  raw softmax model=image_softmax_7m model.backbone.mixer.name=softmax
  raw swa model=image_swa_7m model.backbone.mixer.name=swa
  judge mnist && tokenise mnist && codes mnist gatedfwa 7m && weights mnist_codes-gatedfwa mnist_codes
  [ -e "$KEEP/mnist_tokenizer-score.ok" ] && codes mnist softmax 7m
  ;;
codes10)
  need cifar10/train_{0,1,2,3,4}.webp cifar10/test_0.webp cifar10/test_labels.npy
  judge cifar10 && tokenise cifar10 || fail
  codes cifar10 gatedfwa 20m model=image_gatedfwa_20m
  codes cifar10 softmax 20m
  ;;
cifar)
  need cifar10/train_{0,1,2,3,4}.webp cifar10/test_0.webp cifar10/test_labels.npy
  alone
  run=$KEEP/cifar; recipe=${CIFAR:-image/cifar10_pixels}; budget=${BUDGET:-1200}
  if [ ! -e "$KEEP/cifar.ok" ]; then
    # a start that left no checkpoint is no start
    ls -d "$run"/checkpoints/step-* > /dev/null 2>&1 || rm -rf "$run" "$KEEP/cifar.began" "$KEEP/cifar.steps"
    # the rate of this card first; then as many steps as the budget holds, all in one run: steps may be changed until the rate decays
    [ -e "$KEEP/cifar.began" ] || date +%s > "$KEEP/cifar.began"
    flags=$(cat "$KEEP/try.flags" 2>/dev/null)
    if [ ! -e "$KEEP/cifar.steps" ]; then
      old=$(grep -c tokens_per_second "$run/metrics.jsonl" 2>/dev/null)
      ${PYTHON:-python3} -m zoo.cli train "$recipe" --run "$run" --resume train.steps=1000000 train.save_every=500 $flags ${EXTRA:-} ${EXTRA_LM:-} & pid=$!
      while n=$(grep -c tokens_per_second "$run/metrics.jsonl" 2>/dev/null); ! [ $((${n:-0} - ${old:-0})) -ge "${ROWS:-8}" ]; do
        kill -0 $pid 2>/dev/null || { say "training ended early"; fail; }; sleep 1
      done
      kill -TERM $pid; wait $pid
      ${PYTHON:-python3} - "$run" "$(cat "$KEEP/cifar.began")" "$budget" "${old:-0}" > "$KEEP/cifar.steps.part" <<'P'
import json, sys, time
run, began, budget, old = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
rows = [json.loads(x) for x in open(f"{run}/metrics.jsonl")]
rows = [r for r in rows if "tokens_per_second" in r][old:]
manifest = sorted(__import__("glob").glob(f"{run}/checkpoints/step-*"))[-1]
step = int(manifest.rsplit("-", 1)[1])
import yaml
recipe = yaml.safe_load(open(f"{run}/recipe.yaml"))
elements = recipe["train"]["batch_size"] * 3072
rate = sorted(r["tokens_per_second"] for r in rows[-5:])[2 if len(rows) > 4 else 0] / elements  # steps a second
left = budget - (time.time() - began) - 100  # starting again, evaluations and checkpoints
steps = max(step + 1, int(step + rate * left))
print(steps)
print(f"{rate * elements:.0f} sub-pixels/s, {rate:.2f} steps/s, step {step}, {left:.0f} s left: {steps} steps", file=sys.stderr)
P
      [ -s "$KEEP/cifar.steps.part" ] || { say "no steps chosen"; fail; }
      mv "$KEEP/cifar.steps.part" "$KEEP/cifar.steps"
    fi
    stage cifar zoo train "$recipe" --run "$run" --resume "train.steps=$(cat "$KEEP/cifar.steps")" train.save_every=5000 train.eval_every=10000 $flags ${EXTRA:-} ${EXTRA_LM:-} || fail
    say "training, from its start to its last checkpoint: $(($(date +%s) - $(cat "$KEEP/cifar.began"))) s of wall-clock"
  fi
  score cifar --batch-size 100
  ${PYTHON:-python3} - "$run" <<'P'
import json, sys, yaml
recipe = yaml.safe_load(open(f"{sys.argv[1]}/recipe.yaml"))["train"]
rows = [json.loads(x) for x in open(f"{sys.argv[1]}/metrics.jsonl")]
rates = [r["tokens_per_second"] for r in rows if "tokens_per_second" in r]
each = recipe["log_every"] * recipe["batch_size"] * 3072  # sub-pixels a row; steps done twice after a stop count twice
print(f"training proper, without starts, evaluations and checkpoints: {sum(each / r for r in rates):.0f} s in {len(rates)} rows")
P
  stage cifar-pictures zoo sample "$run" --count 64 --out "$run/pictures.png" --seed 0
  ;;
try) # whole pixels on this card: the step's tests, then 30 steps of the recipe; what works is left for the part cifar
  need cifar10/train_{0,1,2,3,4}.webp cifar10/test_0.webp cifar10/test_labels.npy
  stage try-tests ${PYTHON:-python3} -m pytest -q -p no:cacheprovider -m gpu tests/tasks/image/test_steps.py -k "whole"
  rm -f "$KEEP/try.flags"
  for flags in "" "train.compile=false" "train.compile=false train.graph=false"; do
    rm -rf "$KEEP/try"
    say "30 steps with '${flags:-the recipe as it is}'"
    if zoo train "${CIFAR:-image/cifar10_pixels}" --run "$KEEP/try" train.steps=30 train.schedule.warmup=5 train.log_every=5 train.eval_batches=1 $flags ${EXTRA:-} ${EXTRA_LM:-}; then
      echo "$flags" > "$KEEP/try.flags"; break
    fi
  done
  [ -e "$KEEP/try.flags" ] || fail
  ;;
sampling)
  alone
  bench() { ${PYTHON:-python3} scripts/bench_image_sampling.py "$@" | tee -a "$KEEP/sampling.jsonl"; }
  ( CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${CPU:-12} bench --batches 16 --rounds 1 --patience 20 ${BENCH:-} ) &
  [ "${CUDA_VISIBLE_DEVICES-0}" != "" ] && { bench --graph --rounds 2 ${BENCH:-}; bench --graph --rounds 2 --token pixel --size 35m --window 256 ${BENCH:-}; }
  wait
  ;;
*) say "no part $part"; exit 2 ;;
esac
if [ -e "$KEEP/$part.failed" ]; then say "$part: not all stages passed; another call tries these again"; else say "$part: all stages passed"; touch "$KEEP/$part.done"; fi
