# Call C, 560 s: audio (three codecs, the best of them, codes, what music lacks); what is final already is left out
. .gpu-l3/common.sh
( PYTHONPATH= OUT=$AUDIO WORK=/tmp/audio7 PLACES=6 ONLY='^(?!fsdd-swa|fsdd-softmax|fsdd-gatedfwa-dropout0|jsb_keys|nottingham_keys-(gatedfwa|softmax)|nottingham_joint-(swa|softmax)|piano)' ZOO_COMMIT= bash .gpu-audio/run.sh ${LIMIT:-540} > $OUT/audio.log 2>&1 ); say audio; tail -60 $OUT/audio.log; cp $AUDIO/figures.jsonl $OUT/audio_figures.jsonl
