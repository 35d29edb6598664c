# Issue 7, a lease of its own: bash .gpu-l3/go.sh c.sh 570, carry [.gpu-l3, .gpu-wheels, .gpu-audio]. What is final is left out
export PYTHONUNBUFFERED=1
t0=$SECONDS; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
OUT=$AUDIO WORK=/tmp/audio7 PLACES=6 ONLY='^(?!fsdd-(gatedfwa|swa|softmax|gatedfwa-dropout0)$|jsb_keys|nottingham_keys-(gatedfwa|softmax)|nottingham_joint-(swa|softmax)|piano|show-fsdd)' bash .gpu-audio/run.sh ${LIMIT:-500} > $OUT/audio.log 2>&1; echo "[$((SECONDS - t0))] audio"; tail -60 $OUT/audio.log; cp $AUDIO/figures.jsonl $OUT/audio_figures.jsonl
