#!/usr/bin/env bash
# Runs the tests; sets the environment up first if needed.
#   scripts/test.sh                 the quick ones, on the CPU
#   scripts/test.sh --all           the slow ones too, and those for a GPU where there is one
#   scripts/test.sh tests/ops -k x  anything else goes to pytest
# ZOO_TEST_WORKERS: processes to run them in (default: one a core, four at most; 0 for none, as a debugger needs).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

chosen=(-m "not slow and not gpu")
if [ "${1:-}" = --all ]; then
    shift
    chosen=(-m "slow or not slow")
fi

python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe
cores=$("$python" -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
workers=${ZOO_TEST_WORKERS:-$cores}

# Each process gets one thread: small tests do not fill more, and two processes times two threads fight over two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n "$workers" --dist worksteal "${chosen[@]}" "$@"
