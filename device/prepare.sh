#!/usr/bin/env bash
# In the repository's root: fetches what the device machine lacks into ignored folders. ~4 minutes, most of it xz.
#   .gpu-wheels        omegaconf, soundfile, cffi, mido, fla (carry always)
#   .gpu-fa4           FlashAttention-4's large library, 63.5 MB: alone in a first call, which unpacks it to /tmp/cu13
#   .gpu-l3/fa4        its other wheels
set -euo pipefail
P="--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux_2_34_x86_64 --platform manylinux_2_24_x86_64"
mkdir -p .gpu-wheels .gpu-fa4 .gpu-l3/fa4 .gpu-l3/data/tinyshakespeare /tmp/cu13
python3 -m pip download -q $P -d .gpu-wheels omegaconf soundfile mido flash-linear-attention fla-core cffi pycparser
python3 -m pip download -q --pre $P -d .gpu-l3/fa4 flash-attn-4==4.0.0b36 'apache-tvm-ffi<0.2' torch-c-dlpack-ext quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
python3 -m pip download -q --pre $P -d /tmp/cu13w nvidia-cutlass-dsl-libs-cu13==4.8.1
python3 -c "import zipfile,glob; zipfile.ZipFile(glob.glob('/tmp/cu13w/*cu13*')[0]).extractall('/tmp/cu13')"
(cd /tmp/cu13 && tar cf - . | xz -T2 -9e) > .gpu-fa4/cu13.tar.xz
cp ../shared/data/tinyshakespeare/* .gpu-l3/data/tinyshakespeare/; cp ../shared/data/SHA256SUMS .gpu-l3/data/
git rev-parse HEAD > .gpu-l3/commit
# first call:  carry [.gpu-fa4]            mkdir -p /tmp/cu13 && tar xJf .gpu-fa4/cu13.tar.xz -C /tmp/cu13
# second call: carry [.gpu-l3, .gpu-wheels] bash .gpu-l3/go.sh 575
