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
git -C "$repository" rev-parse HEAD > "$here/commit"
ls -l "$here" "$here/rows"
cat "$here/commit"
