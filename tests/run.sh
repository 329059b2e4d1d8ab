#!/usr/bin/env bash
# Installs the development extra into .venv and passes the tests.
#
#   bash tests/run.sh             # everything: tests beside each other, then those that measure memory, then time,
#                                 # then a covering part under another Megatron-Core (tests/other_end.sh)
#   bash tests/run.sh --quick     # a cross-section, to run before every commit
#   bash tests/run.sh ARGS...     # what pytest selects by ARGS, for example -k resume or a file
#
# CAPGAP_TEST_PROCESSES sets how many processes of pytest run beside each other (by default two a core).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh dev
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== mypy"
# numpy's stubs for Python 3.12 and later are in the language of 3.12; below, all are checked as 3.10 would.
mypy=()
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' && mypy=(--python-version 3.12)
"$python" -m mypy "${mypy[@]}"
echo "== codespell"
"$python" -m codespell_lib

processes="${CAPGAP_TEST_PROCESSES:-$((2 * $(nproc)))}"
reports="$(mktemp -d)"
trap 'rm -rf "$reports"' EXIT

# run NAME MARKS ARGS...: one call of pytest; no test that the arguments select within the marks is no failure.
codes=()
run() {
    local name="$1" marks="$2" code=0
    shift 2
    echo "== pytest: $name"
    "$python" -m pytest -m "$marks" --junitxml="$reports/$name.xml" "$@" || code=$?
    codes+=("$code")
}

quick=()
if [ "${1:-}" = --quick ]; then
    shift
    mapfile -t quick < <(grep -v '^#' tests/quick.txt)
fi
# A file's tests share a process, since they share fixtures: a SLURM, a pool of gloo workers, a run.
together=(-n "$processes" --dist loadfile --no-loadscope-reorder)
case " $* " in
    *" -m "*) run selected "" "${quick[@]}" "$@" ;;
    *)
        run together "not matrix and not memory and not alone" "${together[@]}" "${quick[@]}" "$@"
        if [ "${#quick[@]}" = 0 ]; then
            run memory "not matrix and memory" -n "$(nproc)" --dist load "$@"
            run alone "not matrix and alone" "$@"
        fi
        ;;
esac
"$python" tests/support/times.py "$reports"
if [ "$#" = 0 ] && [ "${#quick[@]}" = 0 ]; then
    code=0
    bash tests/other_end.sh || code=$?
    codes+=("$code")
fi

# pytest's 5 says that nothing was selected: a failure only where it is so for every call.
worst=0
for code in "${codes[@]}"; do
    case "$code" in
        0 | 5) ;;
        *) worst="$code" ;;
    esac
done
if [ "$worst" = 0 ] && [[ ! " ${codes[*]} " =~ " 0 " ]]; then
    worst=5
fi
exit "$worst"
