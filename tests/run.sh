#!/usr/bin/env bash
# Installs the development extra into .venv and passes the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh dev
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== pytest"
exec "$python" -m pytest "$@"
