set -u
. .gpu-l3/env.sh
BASE=$PYTHONPATH; export PYTHONPATH=$PYTHONPATH:$PWD/.gpu-l3
t0=$SECONDS; say() { echo "[$((SECONDS - t0))] $*"; }
T="python3 -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark -p failures --tb=short --timeout 300"
failed() { grep -a "^===\|^E  \|Error" $OUT/failures.txt 2>/dev/null | cut -c1-200 | head -${1:-40}; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
