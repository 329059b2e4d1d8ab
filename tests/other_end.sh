#!/usr/bin/env bash
# A covering part of the tests under the other end of the supported releases: where .venv has a Python below 3.12 and so
# Megatron-Core 0.16, under 3.12 or 3.13 with the newest Megatron-Core; where it has those, under 3.11 or 3.10 with 0.16.
#
#   bash tests/other_end.sh             # what tests/covering.txt lists
#   bash tests/other_end.sh ARGS...     # what pytest selects by ARGS
#
# The environment, .venv-other-end or CAPGAP_OTHER_VENV, is made once and kept. Without such a Python nothing is run.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh dev
if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
    export CAPGAP_PYTHONS="python3.12 python3.13"
else
    export CAPGAP_PYTHONS="python3.11 python3.10"
fi
export CAPGAP_VENV="${CAPGAP_OTHER_VENV:-$PWD/.venv-other-end}"
unset PYTHON
code=0
bash -c 'source tools/install.sh dev' || code=$?  # with its own errexit, which || takes from a subshell
if [ "$code" = 2 ] && [ ! -x "$CAPGAP_VENV/bin/python" ]; then
    echo "== the other end of the supported releases was not tested: see the line above"
    exit 0
fi
[ "$code" = 0 ] || exit "$code"
python="$CAPGAP_VENV/bin/python"

processes="${CAPGAP_TEST_PROCESSES:-$((2 * $(nproc)))}"
selected=("$@")
if [ "$#" = 0 ]; then
    mapfile -t selected < <(grep -v '^#' tests/covering.txt)
fi
echo "== pytest: the other end: $("$python" -c '
import platform
from importlib.metadata import version
print("Python", platform.python_version(), "Megatron-Core", version("megatron-core"), "torch", version("torch"))')"
"$python" -m pytest -m "not matrix and not memory and not alone" -n "$processes" --dist loadfile \
    --no-loadscope-reorder "${selected[@]}"
