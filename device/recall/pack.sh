#!/usr/bin/env bash
# Here, once: the data that parts text and speed need, packed; the rows that are there already; the commit.
#   bash .gpu-recall/pack.sh [REPOSITORY] [ROWS: a folder with <suite>.jsonl of earlier commands]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=${1:-$here/..} rows=${2:-$here/rows}
mkdir -p "$here/rows"
if [ ! -e "$here/text.tar.xz" ]; then
    tar -C "${ZOO_DATA:-/work/shared/data}" -cf - wikitext-2 gutenberg | xz -T2 -6 > "$here/text.tar.xz.part"
    mv "$here/text.tar.xz.part" "$here/text.tar.xz"
fi
[ "$(cd "$rows" && pwd)" = "$here/rows" ] || cp "$rows"/*.jsonl "$here/rows/"
cd "$repository"
[ -z "$(git status --porcelain -uno)" ] || { echo "commit first: rows name the commit"; exit 1; }
git rev-parse HEAD > "$here/commit"
cat $(find zoo tasks configs -type f -not -name '*.pyc' | LC_ALL=C sort) | sha256sum > "$here/tree"
ls -l "$here" "$here/rows"
cat "$here/commit"
