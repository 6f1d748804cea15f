#!/usr/bin/env bash
# Deploys two tiny models with app_v5.py on a Ray head of its own, and asks each one something.
#
#     bash tests/demo.sh            stops everything at the end
#     bash tests/demo.sh --keep     leaves it running, and says how to reach and how to stop it
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tests/setup.sh"
exec "$root/.venv/bin/python" "$root/tests/demo.py" "$@"
