# sourced: packages that the machine lacks, data, commit. FlashAttention-4's large part lies in two halves (calls 0 and A)
export PYTHONUNBUFFERED=1 ZOO_COMMIT=$(cat .gpu-l3/commit) ZOO_DATA=$PWD/.gpu-l3/data
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-1}
if [ ! -e /tmp/site/.ready ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu-wheels/*.whl .gpu-l3/fa4/*.whl 2>&1 | tail -2
  touch /tmp/site/.ready
fi
export PYTHONPATH=$PWD:/tmp/site:/tmp/site/nvidia_cutlass_dsl/dsl_packages
export LD_LIBRARY_PATH=/tmp/site/nvidia_cutlass_dsl/cu13/lib:${LD_LIBRARY_PATH:-}
