# Call B, chained to A: waits for `zoo bench kernels` (WAIT seconds at most); every 60 s what is running, so that a hang can be seen
. .gpu-l3/common.sh
while kill -0 $(cat /tmp/kernels.pid) 2>/dev/null && [ $((SECONDS - t0)) -lt ${WAIT:-500} ]; do
  sleep 2; [ $(((SECONDS - t0) % 60)) -lt 2 ] && { say $(wc -l < $OUT/k/bench.csv 2>/dev/null) rows; ps -eo etimes,args | grep -a '[z]oo.bench\|[p]ytest.*test_gpu' | cut -c1-120 | sort -n | tail -4; }
done; say kernels; tail -c 6000 $OUT/kernels.log
