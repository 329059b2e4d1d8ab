#!/usr/bin/env bash
# Makes .venv in the repository where there is none, and installs the project into it.
#
#   source tools/install.sh EXTRAS     # for example: source tools/install.sh dev
#
# Sets $python to the virtual environment's interpreter. A second call finds everything in place and is quick.
#
#   PYTHON=python3.12    makes the environment with this interpreter; by default python3 if it is suitable, or the newest
#                        suitable one on the path, of pyenv or of uv
#   CAPGAP_PYTHONS="python3.13 python3.12"    looks for these alone
#   CAPGAP_VENV=DIR      the environment, in place of .venv
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="${CAPGAP_VENV:-$repository/.venv}"
python="$environment/bin/python"
extras="$1"
# What decides the installed set: the requirements, the extras, this script and the one that it calls.
releases="$repository/megatron_capgap/runtime/releases.py"
engine="$repository/tools/install_transformer_engine_cpu.py"
decisive=("$repository/setup.py" "$releases" "${BASH_SOURCE[0]}" "$engine"
    "$repository/megatron_capgap/devices/transformer_engine_cpu/files.py")
stamp="$environment/.installed-$extras-$(cat "${decisive[@]}" | sha256sum | cut -c1-16)"

# unsuitable PYTHON: says in some words why an environment cannot be made with it; nothing where it can.
unsuitable() {
    local version
    if ! version="$("$1" -c 'import platform; print(platform.python_version())' 2>/dev/null)"; then
        echo "does not start"
    elif ! "$1" "$releases" 2>/dev/null; then
        echo "is $version"
    elif ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "has no ensurepip (on Debian: apt install python3-venv)"
    fi
}

# The interpreters that may be there, the preferred ones first; pyenv's shims on the path need not start.
candidates() {
    local names=(python3 python3.13 python3.12 python3.11 python3.10) name
    if [ -n "${CAPGAP_PYTHONS:-}" ]; then
        read -ra names <<<"$CAPGAP_PYTHONS"
    fi
    printf '%s\n' "${names[@]}"
    for name in "${names[@]}"; do
        printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/"$name"
        printf '%s\n' "${UV_PYTHON_INSTALL_DIR:-${HOME:-}/.local/share/uv/python}"/*/bin/"$name"
    done
}

if [ ! -x "$python" ]; then
    chosen="${PYTHON:-}" tried=""
    if [ -n "$chosen" ]; then
        reason="$(unsuitable "$chosen")"
        if [ -n "$reason" ]; then
            echo "install: PYTHON=$chosen $reason; name a Python 3.10, 3.11, 3.12 or 3.13" >&2
            exit 2
        fi
    else
        while IFS= read -r candidate; do
            if command -v "$candidate" >/dev/null; then
                reason="$(unsuitable "$candidate")"
                if [ -z "$reason" ]; then
                    chosen="$candidate"
                    break
                fi
                tried="${tried:+$tried, }$candidate $reason"
            fi
        done < <(candidates)
    fi
    if [ -z "$chosen" ]; then
        echo "install: no ${CAPGAP_PYTHONS:-Python 3.10, 3.11, 3.12 or 3.13} found (${tried:-none is there}); install one, for example" \
            "by 'uv python install 3.12', or make $environment yourself" >&2
        exit 2
    fi
    echo "== making $environment with $chosen"
    "$chosen" -m venv "$environment"
elif [ -n "${PYTHON:-}" ] && [ "$("$python" -c 'import sys; print(*sys.version_info[:2])')" != \
    "$("$PYTHON" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" ]; then
    echo "install: $environment was not made with PYTHON=$PYTHON; remove it, or name another one by CAPGAP_VENV" >&2
    exit 2
fi
if [ ! -e "$stamp" ]; then
    pip=("$python" -m pip install --disable-pip-version-check)
    torch=()
    if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        # The release that the figures of the README are of, where pip finds it.
        torch=("torch==2.13.0")
        report="$("${pip[@]}" --quiet --dry-run --no-deps --report - "${torch[@]}" 2>/dev/null)" || torch=("torch")
        if [[ "${report:-}" == *'"nvidia-cudnn'* ]]; then
            echo "== torch comes with CUDA's libraries here: about 2.5 GB to download, 5 GB on disk (for a CPU build," \
                "install torch into $environment first)"
        fi
    fi
    echo "== installing megatron_capgap[$extras] and what it needs (minutes the first time)"
    "${pip[@]}" --quiet "${torch[@]}" -e "$repository[$extras]"
    # The tests run Transformer Engine's own layers on the CPU.
    if [ "$extras" = dev ]; then
        "$python" "$engine"
    fi
    touch "$stamp"
fi
