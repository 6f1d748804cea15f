#!/usr/bin/env bash
# Everything that must hold: lint, format, types, tests. Arguments go to pytest:
#
#     bash tests/run.sh -m "not engine"
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/setup.sh
bin=.venv/bin

set -x
"$bin/python" -m ruff check .
"$bin/python" -m ruff format --check .
"$bin/python" -m mypy & # beside the first tests, which need one core
types=$!
failed=0
"$bin/python" -m pytest "$@" </dev/null || failed=$?
wait "$types" || failed=1
exit "$failed"
