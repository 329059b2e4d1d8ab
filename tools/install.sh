#!/usr/bin/env bash
# Makes .venv in the repository where there is none, and installs the project into it.
#
#   source tools/install.sh EXTRAS     # for example: source tools/install.sh dev
#
# Sets $python to the virtual environment's interpreter. A second call finds everything in place and is quick.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="${CAPGAP_VENV:-$repository/.venv}"
python="$environment/bin/python"
extras="$1"
# What decides the installed set: the requirements, the extras, this script and the one that it calls.
engine="$repository/tools/install_transformer_engine_cpu.py"
stamp="$environment/.installed-$extras-$(cat "$repository/setup.py" "${BASH_SOURCE[0]}" "$engine" | sha256sum | cut -c1-16)"

if [ ! -x "$python" ]; then
    # Megatron-Core 0.16 is the newest for Python 3.10 and 3.11.
    for candidate in python3.11 python3.10 python3; do
        if "$candidate" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; then
            break
        fi
        candidate=
    done
    if [ -z "$candidate" ]; then
        echo "install: no Python 3.10 or 3.11 found; install one, or make $environment yourself" >&2
        exit 2
    fi
    echo "== making $environment with $candidate"
    "$candidate" -m venv "$environment"
fi
if [ ! -e "$stamp" ]; then
    echo "== installing megatron_capgap[$extras] and what it needs (minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e "$repository[$extras]"
    # The tests run Transformer Engine's own layers on the CPU.
    if [ "$extras" = dev ]; then
        "$python" "$engine"
    fi
    touch "$stamp"
fi
