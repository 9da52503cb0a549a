#!/usr/bin/env bash
# Makes what benchmarks/gpu.py needs on a machine that has torch 2.11, torchvision, timm, rich, safetensors, pytest, scipy and
# matplotlib for Python 3.12 on x86-64 Linux, but neither Ray, torchcodec nor lightly, nor data, nor git, nor a network:
#
#     scripts/gpu_bundle.sh [--fresh] [DIR]      # DIR: .gpu by default; then, on that machine: benchmarks/gpu.py --bundle DIR
#
# cifar10-jpeg.tar.gz   CIFAR-10 as JPEG folders, from $ROTSSL_DATA
# site.tar.xz           Ray, torchcodec and lightly with what they need, for PYTHONPATH; pandas and pyarrow, which Ray Train needs, are too large
# commit                of this checkout
set -euo pipefail
cd "$(dirname "$0")/.."

MOST=60000000 # bytes, in all
RAY="ray>=2.50,<3"
# What Ray Train and Tune import (but for pandas and pyarrow), and rotssl.
NEEDS=(click filelock jsonschema msgpack packaging protobuf pyyaml requests fsspec pydantic psutil cloudpickle tensorboardx)
# What lightly imports, without torch and torchvision; pytorch_lightning it does not need for what is measured here.
LIGHTLY_NEEDS=(certifi lightning-utilities python-dateutil six tqdm urllib3 aenum)
# Taken without their own needs, which are above or on the machine.
ALONE=("$RAY" "torchcodec>=0.16,<1" "lightly>=1.5.20,<2" lightly-utils hydra-core omegaconf "antlr4-python3-runtime==4.9.*")
# Large, and on the machine already.
NOT=(numpy numpy.libs PIL pillow pillow.libs torch torchvision nvidia triton sympy networkx)
# Of Ray: what one machine without a dashboard, Java, C++, RLlib, Serve and LLMs has no use for.
RAY_NOT=(jars rllib llm serve cpp dashboard/client core/src/ray/raylet/raylet.debug)

fail() { echo "gpu_bundle.sh: $1" >&2; exit "${2:-2}"; }

fresh=no
if [ "${1:-}" = --fresh ]; then fresh=yes; shift; fi
out=${1:-.gpu}
mkdir -p "$out"

data=${ROTSSL_DATA:-../shared/data}/cifar10-jpeg.tar.gz
[ -f "$data" ] || fail "ROTSSL_DATA: expected a folder with cifar10-jpeg.tar.gz"
cmp -s "$data" "$out/cifar10-jpeg.tar.gz" || { cp "$data" "$out/data.part" && mv "$out/data.part" "$out/cifar10-jpeg.tar.gz"; }

uv=$(command -v .venv/bin/uv || command -v uv) || fail "uv is not here: make setup installs it"
stamp=$(sha256sum "$0" | cut -c1-16)
if [ $fresh = yes ] || [ "$(cat "$out/site.stamp" 2>/dev/null)" != "$stamp" ] || [ ! -f "$out/site.tar.xz" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    into=(--quiet --target "$work/site" --python-version 3.12 --python-platform x86_64-manylinux_2_28)
    "$uv" pip install "${into[@]}" --no-deps "${ALONE[@]}" # antlr4 comes as source, which is pure Python
    "$uv" pip install "${into[@]}" --only-binary :all: "${NEEDS[@]}" "${LIGHTLY_NEEDS[@]}"
    for name in "${NOT[@]}"; do rm -rf "$work/site/$name" "$work/site/$name"-*.dist-info; done
    for name in "${RAY_NOT[@]}"; do rm -rf "$work/site/ray/$name"; done
    find "$work/site" -depth \( -name __pycache__ -o -name tests -o -name '*.pyi' -o -name '*.h' -o -name '*.pxd' \) -exec rm -rf {} +
    tar --sort=name --owner=0 --group=0 --mtime=@0 -C "$work/site" -cf "$work/site.tar" .
    xz -9e -T0 "$work/site.tar"
    mv "$work/site.tar.xz" "$out/site.part" && mv "$out/site.part" "$out/site.tar.xz"
    (cd "$work/site" && for info in *.dist-info; do echo "${info%.dist-info}"; done) >"$out/site.list"
    echo "$stamp" >"$out/site.stamp"
fi

git rev-parse HEAD | tr -d '\n' >"$out/commit"
[ -z "$(git status --porcelain)" ] || printf -- -dirty >>"$out/commit"

tr '-' ' ' <"$out/site.list" | paste -sd, | sed 's/,/, /g'
(cd "$out" && wc -c cifar10-jpeg.tar.gz site.tar.xz commit)
sum=$(cat "$out/cifar10-jpeg.tar.gz" "$out/site.tar.xz" "$out/commit" | wc -c)
[ "$sum" -le $MOST ] || fail "$sum bytes, expected at most $MOST" 1
