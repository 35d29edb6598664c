# go.sh SCRIPT LIMIT: runs it; all its files in one archive, audio's beside it
export PACK=$OUT AUDIO=/tmp/audio-out; mkdir -p /tmp/out $AUDIO; export OUT=/tmp/out
timeout $2 bash .gpu-l3/$1 > $OUT/run.log 2>&1
tail -c 11500 $OUT/run.log; tar -C /tmp/out -cJf $PACK/all.tar.xz .
cp $AUDIO/media.tar.xz $AUDIO/state.tar.0? /tmp/cache-out/cache.* $PACK/ 2>/dev/null; true
