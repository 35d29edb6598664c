#!/usr/bin/env bash
# In the repository's root: fetches what the device machine lacks into ignored folders. ~4 minutes, most of it xz.
#   .gpu-wheels        omegaconf, soundfile, cffi, mido, fla (carry always)
#   .gpu-fa4a, -fa4b   FlashAttention-4's large library, 63.5 MB, in two halves: with the repository one call cannot take it whole
#   .gpu-l3/fa4        its other wheels
set -euo pipefail
P="--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux_2_34_x86_64 --platform manylinux_2_24_x86_64"
mkdir -p .gpu-wheels .gpu-fa4a .gpu-fa4b .gpu-l3/fa4 .gpu-l3/data/tinyshakespeare /tmp/cu13
python3 -m pip download -q $P -d .gpu-wheels omegaconf soundfile mido flash-linear-attention fla-core cffi pycparser
python3 -m pip download -q --pre $P -d .gpu-l3/fa4 flash-attn-4==4.0.0b36 'apache-tvm-ffi<0.2' torch-c-dlpack-ext quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
python3 -m pip download -q --pre $P -d /tmp/cu13w nvidia-cutlass-dsl-libs-cu13==4.8.1
python3 -c "import zipfile,glob; zipfile.ZipFile(glob.glob('/tmp/cu13w/*cu13*')[0]).extractall('/tmp/cu13')"
(cd /tmp/cu13 && tar cf - . | xz -T2 -9e) > /tmp/cu13.tar.xz
split -b 40M /tmp/cu13.tar.xz /tmp/cu13.part. && mv /tmp/cu13.part.aa .gpu-fa4a/cu13.part.a && mv /tmp/cu13.part.ab .gpu-fa4b/cu13.part.b
cp ../shared/data/tinyshakespeare/* .gpu-l3/data/tinyshakespeare/; cp ../shared/data/SHA256SUMS .gpu-l3/data/
git rev-parse HEAD > .gpu-l3/commit
