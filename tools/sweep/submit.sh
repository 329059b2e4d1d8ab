#!/usr/bin/env bash
# Submits the sweep: one array per phase, each after the previous one has ended, successfully or not. A run whose
# teacher or student is not finished is refused; the others run. At most LIMIT runs at a time (default 16); further
# sbatch options as arguments. Called again, it submits the sweep again; finished runs end at once.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for file in @NEEDED@; do
    if [ ! -e "$file" ]; then
        echo "submit.sh: error: $file not found; create it, or call make_sweep in the folder that paths refer to" >&2
        exit 2
    fi
done
previous=
for phase in "$here"/phase_*.txt; do
    runs=$(wc -l < "$phase")
    previous=$(sbatch --parsable ${previous:+--dependency=afterany:$previous} \
        --array="0-$((runs - 1))%${LIMIT:-16}" "$@" "$here/array.sbatch" "$phase")
    echo "$(basename "$phase" .txt): job $previous, $runs runs"
done
