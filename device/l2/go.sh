timeout ${1:-575} bash .gpu-l2/run.sh > $OUT/run.log 2>&1
cd $OUT; tail -c 10500 run.log; tail -c 700 nsa.err; tar cJf /tmp/all.tar.xz . ; mkdir -p /tmp/keep; find . -mindepth 1 -delete; cp /tmp/all.tar.xz .
