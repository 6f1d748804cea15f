#!/usr/bin/env bash
# Measures app_v5.py beside what people would use instead, and writes docs/BENCHMARKS.md.
#
#     bash tests/bench/run.sh                  everything (an hour on two cores; nothing else should run meanwhile)
#     bash tests/bench/run.sh slow8 refused    some parts: the others' last figures stay
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tests/setup.sh
PYTHONPATH=tests exec .venv/bin/python tests/bench/bench.py "$@" </dev/null
