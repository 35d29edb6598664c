#!/usr/bin/env bash
# Here, once: the data that the runs need, packed, the commit and a sum over the tree, into this folder. ZOO_DATA: where data lie.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); cd "${1:-$here/..}"
[ -z "$(git status --porcelain -uno)" ] || { echo "commit first: rows name the commit"; exit 1; }
mkdir -p "$here/data"
[ -e "$here/data/audio.tar.xz" ] || { tar -C "${ZOO_DATA:-/work/shared/data}" -cf - free-spoken-digit-dataset \
  polymusic/{JSB_Chorales,Nottingham,Piano_midi}.mat | xz -T2 -6 > "$here/data/audio.tar.xz.part"
mv "$here/data/audio.tar.xz.part" "$here/data/audio.tar.xz"; }
git rev-parse HEAD > "$here/commit"
cat $(find zoo tasks configs -type f -not -name '*.pyc' | LC_ALL=C sort) | sha256sum > "$here/tree"
ls -l "$here/data"; cat "$here/commit"
