#!/bin/bash
# What series' run.sh needs beside the tree, into .gpu-series/data: ETTh1, ETTm1, M4 hourly (15 MB as they are, 4 MB
# packed). Run in the lead's tree after copying this folder there: bash .gpu-series/pack.sh [DATA]
set -eu
cd "$(dirname "$0")"
data=${1:-${ZOO_DATA:-/work/shared/data}}
tar -C "$data" -cJf data.tar.xz ett/ETTh1.csv ett/ETTm1.csv m4
git -C .. rev-parse HEAD > commit
ls -la data.tar.xz; cat commit
