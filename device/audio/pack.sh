#!/usr/bin/env bash
# Here, once: the data that the runs need, packed, and the commit, into this folder. ZOO_DATA names where they are.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$here/data"
tar -C "${ZOO_DATA:-/work/shared/data}" -cf - free-spoken-digit-dataset \
  polymusic/{JSB_Chorales,Nottingham,Piano_midi}.mat | xz -T2 -6 > "$here/data/audio.tar.xz.part"
mv "$here/data/audio.tar.xz.part" "$here/data/audio.tar.xz"
git -C "${1:-$here/..}" rev-parse HEAD > "$here/commit"
ls -l "$here/data"; cat "$here/commit"
