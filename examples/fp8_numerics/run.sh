#!/usr/bin/env bash
# What FP8 costs in accuracy: the quickstart's distillation in fp32, bf16 and every FP8 recipe, same data and seed, on
# a CPU over the emulated kernels of Transformer Engine. A second call goes on where the first one stopped.
#
#   bash examples/quickstart/run.sh      # first: it makes the data, the teacher and the pruned student
#   bash examples/fp8_numerics/run.sh
#
# The runs go below runs/fp8 of the quickstart's work folder, what was found to examples/fp8_numerics/results.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$here/../quickstart/work"
if [ ! -e "$work/runs/pruned/latest" ]; then
    echo "fp8_numerics: $work/runs/pruned is not there; bash examples/quickstart/run.sh makes it, run that first" >&2
    exit 2
fi
source "$here/../../tools/install.sh" plot
"$python" "$here/../../tools/install_transformer_engine_cpu.py"
cd "$work"
"$python" "$here/study.py" --config "$here/study.yaml" --runs runs/fp8 --out "$here/results"
