#!/usr/bin/env bash
# The paper's road to MiniMA-3B on a SLURM cluster:
#
#   bash examples/minima_3b/run.sh import vocabulary data
#   bash examples/minima_3b/run.sh adapt prune distill finetune evaluate [--section.key=value ...]
#   bash examples/minima_3b/run.sh export
#
# The first three steps and the last run where they are called. Stages are jobs of examples/slurm/stage.sbatch, which
# come back after a time limit until the stage is done; each waits for the end of the one before it in the call, and is
# cancelled where that fails. The same call goes on from there. Keys go to all stages of a call. sbatch takes its time
# limit, partition and account from SBATCH_TIMELIMIT, SBATCH_PARTITION and SBATCH_ACCOUNT.
#
# Models, data and runs lie below WORK (the current folder). What each step reads:
#   LLAMA2         import: a Hugging Face folder of LLaMA2-7B, with tokenizer.model
#   PILE GITHUB WUDAO VALID
#                  vocabulary, data: jsonl files with a `text` field, WUDAO in Chinese; several in one word are fine
#   finetune reads data/chat_train.jsonl and data/chat_valid.jsonl, a line {"messages": [...]} each
#   NODES, GPUS    stages: nodes and GPUs on each (2 and 8); RANKS processes convert (8)
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

job=
submit() { # after the stage that was submitted before, if any
    job=$(CAPGAP_PYTHON="$python" sbatch --parsable --job-name="$1" --nodes="${NODES:-2}" \
        --ntasks-per-node="${GPUS:-8}" --gpus-per-node="${GPUS:-8}" \
        ${job:+--dependency=afterok:$job --kill-on-invalid-dep=yes} \
        "$here/../slurm/stage.sbatch" "$1" --config "$here/$1.yaml" ${keys[@]+"${keys[@]}"})
    job=${job%%;*} # the cluster's name may follow
    echo "$1: job $job"
}

prepare() { # prepare NAME FILES...
    "$python" "$tools/prepare_data.py" --input "${@:2}" --tokenizer "$expanded/tokenizer.model" --out "data/$1"
}

run() {
    case "$1" in
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
            submit "$1"
            ;;
        export)
            on_cpus "$tools/convert_hf.py" export --checkpoint runs/minima_3b --out hf/minima_3b
            ;;
    esac
}

fail() {
    echo "run.sh: error: $1" >&2
    exit 2
}

steps=() keys=() stage=
for word in "$@"; do
    case "$word" in
        --*) keys+=("$word") ;;
        adapt | prune | distill | finetune | evaluate) steps+=("$word") stage=$word ;;
        import | vocabulary | data | export)
            [ -z "$stage" ] || fail "$word: would not wait for the job of $stage; call it when that has ended"
            steps+=("$word")
            ;;
        *) fail "$word: import, vocabulary, data, adapt, prune, distill, finetune, evaluate or export would do" ;;
    esac
done
[ ${#steps[@]} -gt 0 ] || fail "no step given; see the head of $0"
for step in "${steps[@]}"; do
    run "$step"
done
