#!/usr/bin/env bash
# Issue 7 on a GPU, in the repository's root: .gpu-audio/run.sh LIMIT_SECONDS
# STEPS=n makes all of it tiny (a test on a CPU). WORK: where runs lie. ONLY: a regular expression of job names.
# A second call goes on: state.tar.* of the first in .gpu-audio/resume/ (or WORK still there, on a warm machine).
set -uo pipefail
export START=$(date +%s.%N) LIMIT=${1:-540}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); root=$PWD
export OUT=${OUT:-/tmp/audio7-out} WORK=${WORK:-/tmp/audio7} HERE=$here ROOT=$root
mkdir -p "$OUT" "$WORK/runs" "$WORK/logs"
if compgen -G "$root/.gpu-wheels/*.whl" > /dev/null && [ ! -e /tmp/site/.ready-audio ] && ! python3 -c 'import omegaconf, soundfile, mido' 2> /dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$root"/.gpu-wheels/*.whl 2>&1 | tail -2
  touch /tmp/site/.ready-audio
fi
[ "$(cat "$here/tree")" = "$(cat $(find zoo tasks configs -type f -not -name '*.pyc' | LC_ALL=C sort) | sha256sum)" ] || { echo "pack.sh was run on another tree"; exit 3; }
export ZOO_COMMIT=$(cat "$here/commit") ZOO_DATA=$WORK/data PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export PYTHONPATH=$root:/tmp/site${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=Agg
[ -d "$WORK/data/polymusic" ] || { mkdir -p "$WORK/data"; tar -C "$WORK/data" -xJf "$here/data/audio.tar.xz"; }
if compgen -G "$here/resume/state.tar.*" > /dev/null; then cat "$here"/resume/state.tar.* | tar -C "$WORK" --skip-old-files -xf - ; fi
cd "$WORK" && exec "${PYTHON:-python3}" "$here/drive.py"
