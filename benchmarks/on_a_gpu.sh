#!/usr/bin/env bash
# Runs tests/gpu, then benchmarks/gpu.py, on a machine with a GPU, within a number of seconds.
#
#   bash benchmarks/on_a_gpu.sh SECONDS OUT [ARGUMENTS of gpu.py]
#
# OUT/tests.log, OUT/results.jsonl, OUT/marks.md and OUT/trace_*.json.gz hold what was found. The tests get at most a
# quarter of the time (TEST_SECONDS sets another limit, 0 leaves them out). A second call with the same OUT and
# --parts a,b adds what the first one did not reach. PYTHON chooses the interpreter, which must have torch, transformers
# and pytest.
#
# WHEELS names a folder of wheels to use besides, on a machine without a network. Made elsewhere, for its Python:
#
#   to="--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --only-binary=:all: -d W"
#   pip download $to pydantic
#   pip download $to --no-deps megatron-core==0.19.2 liger-kernel cut-cross-entropy nvidia-modelopt omegaconf pulp
#   pip wheel --no-deps -w W antlr4-python3-runtime==4.9.3
set -uo pipefail
if [ "$#" -lt 2 ]; then
    sed -n '2,16p' "$0"
    exit 2
fi
begun=$SECONDS seconds="$1"
mkdir -p "$2"
out="$(cd "$2" && pwd)"
shift 2
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi
limit="${TEST_SECONDS:-$((seconds / 4))}"
tests=0
if [ "$limit" -gt 0 ]; then
    timeout -k 5 "$limit" "$python" -m pytest -p no:cacheprovider -rs tests/gpu 2>&1 | tee "$out/tests.log"
    tests="${PIPESTATUS[0]}"
    [ "$tests" = 124 ] && echo "tests/gpu: not all ran within $limit seconds" | tee -a "$out/tests.log"
fi
"$python" benchmarks/gpu.py --out "$out" --seconds "$((seconds - (SECONDS - begun)))" "$@"
marks=$?
echo "tests/gpu: exit code $tests; benchmarks/gpu.py: exit code $marks; $((SECONDS - begun)) seconds"
[ "$tests" = 0 ] && [ "$marks" = 0 ]
