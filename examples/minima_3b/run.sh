#!/usr/bin/env bash
# The paper's road to MiniMA-3B on a SLURM cluster, one step a call:
#
#   bash examples/minima_3b/run.sh STEP
#
# STEP is import, vocabulary, data, adapt, prune, distill, finetune, evaluate or export.
#
# Models, data and runs lie below WORK (the current folder). What each step reads:
#   LLAMA2         import: a Hugging Face folder of LLaMA2-7B, with tokenizer.model
#   PILE GITHUB WUDAO VALID
#                  vocabulary, data: jsonl files with a `text` field, WUDAO in Chinese; several in one word are fine
#   finetune reads data/chat_train.jsonl and data/chat_valid.jsonl, a line {"messages": [...]} each
#   NODES, GPUS    training: nodes and GPUs on each (2 and 8); RANKS processes convert (8)
# The configurations suit 16 GPUs of 80 GB and, as they are, 128. First: python examples/minima_3b/check.py --gpus 16
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
tools="$here/../../tools"
cd "${WORK:-.}"
python=${PYTHON:-python}
expanded=runs/llama2_7b_expanded

on_cpus() { # each process converts its own share
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nproc-per-node "${RANKS:-8}" "$@"
}

stage() {
    srun --nodes "${NODES:-2}" --ntasks-per-node "${GPUS:-8}" --gpus-per-node "${GPUS:-8}" --kill-on-bad-exit=1 \
        "$python" -m megatron_capgap "$1" --config "$here/$1.yaml" "${@:2}"
}

prepare() { # prepare NAME FILES...
    "$python" "$tools/prepare_data.py" --input "${@:2}" --tokenizer "$expanded/tokenizer.model" --out "data/$1"
}

case "${1:-}" in
    import)
        on_cpus "$tools/convert_hf.py" import --hf "$LLAMA2" --out runs/llama2_7b --dtype bf16
        ;;
    vocabulary)
        # The paper's model has 49,216 tokens. How many come in follows from what both vocabularies share.
        mkdir -p data
        "$python" "$tools/prepare_data.py" --input $WUDAO --tokenizer data/zh.model --train-tokenizer 20000 \
            --out data/zh_alone
        on_cpus "$tools/expand_vocab.py" --tokenizer runs/llama2_7b/huggingface --add data/zh.model \
            --checkpoint runs/llama2_7b --text $VALID --out "$expanded"
        ;;
    data)
        prepare pile $PILE
        prepare github $GITHUB
        prepare wudao $WUDAO
        prepare valid $VALID
        ;;
    adapt | prune | distill | finetune | evaluate)
        stage "$@"
        ;;
    export)
        on_cpus "$tools/convert_hf.py" export --checkpoint runs/minima_3b --out hf/minima_3b
        ;;
    *)
        steps="import, vocabulary, data, adapt, prune, distill, finetune, evaluate or export"
        echo "run.sh: error: ${1:-no step given}: $steps would do" >&2
        exit 2
        ;;
esac
