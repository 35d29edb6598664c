timeout ${1:-575} bash .gpu-l3/run.sh > $OUT/run.log 2>&1
cd $OUT; tail -c 11500 run.log; tar cJf /tmp/all.tar.xz . ; mkdir -p /tmp/keep; find . -mindepth 1 -delete; cp /tmp/all.tar.xz .
