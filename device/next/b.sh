# Call B, chained to A: waits for `zoo bench kernels`; then arms of training, warmed all at once beside the curves
. .gpu-l3/common.sh
while kill -0 $(cat /tmp/kernels.pid) 2>/dev/null && [ $((SECONDS - t0)) -lt ${WAIT:-500} ]; do sleep 2; done; say kernels; tail -c 6000 $OUT/kernels.log
