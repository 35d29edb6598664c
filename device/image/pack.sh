#!/bin/bash
# Data of image's run.sh: bash .gpu-image/pack.sh mnist | cifar_a | cifar_b | clean   [DATA]
# Carry .gpu-image and .gpu-wheels. CIFAR-10 goes in two calls, 51 MB each: `pack.sh cifar_a`, call; `pack.sh cifar_b`, call.
# Each pack leaves only its own data in .gpu-image/data; the device keeps what it got in /tmp/data.
set -eu
cd "$(dirname "$0")"
data=${2:-${ZOO_DATA:-/work/shared/data}}
if [ -n "$(git -C .. status --porcelain --untracked-files=no)" ]; then echo "the tree has changes that are not committed: its numbers would name the wrong commit"; exit 1; fi
rm -rf data; mkdir data
git -C .. rev-parse HEAD > commit
case $1 in
  mnist) mkdir data/mnist; cp "$data"/mnist/*.gz data/mnist/ ;;
  cifar_a) mkdir data/cifar10; cp "$data"/cifar10/train_{0,1,2}.webp "$data"/cifar10/*.npy data/cifar10/ ;;
  cifar_b) mkdir data/cifar10; cp "$data"/cifar10/train_{3,4}.webp "$data"/cifar10/test_0.webp data/cifar10/ ;;
  clean) ;;
  *) echo "mnist, cifar_a, cifar_b or clean"; exit 2 ;;
esac
chmod -R u+w data; du -sh .; cat commit
