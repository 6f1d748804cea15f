#!/usr/bin/env bash
# Makes the pictures of the READMEs from real runs: the terminal as SVG, the dashboard with a headless Chromium.
#
#     bash docs/pictures.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/setup.sh
PYTHONPATH=.:tests exec .venv/bin/python docs/pictures.py </dev/null
