# sourced: packages that the machine lacks, data, commit. FlashAttention-4's large part lies in /tmp/cu13 (call 0)
export PYTHONUNBUFFERED=1 ZOO_COMMIT=$(cat .gpu-l1/commit) ZOO_DATA=$PWD/.gpu-l1/data
if [ ! -e /tmp/site/.ready ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu-wheels/*.whl .gpu-l1/fa4/*.whl 2>&1 | tail -2
  cp -r /tmp/cu13/nvidia_cutlass_dsl /tmp/site/ 2>/dev/null
  touch /tmp/site/.ready
fi
export PYTHONPATH=$PWD:/tmp/site:/tmp/site/nvidia_cutlass_dsl/dsl_packages
export LD_LIBRARY_PATH=/tmp/site/nvidia_cutlass_dsl/cu13/lib:${LD_LIBRARY_PATH:-}
