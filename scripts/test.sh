#!/usr/bin/env bash
# Installs and runs the tests: no hub, no GPU, no data needed. About 11 minutes on 2 cores after installing.
# Variables: OLICA_DATA, a folder of real text and evaluation sets, lets the tests that want it run.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
export HF_HUB_OFFLINE=1
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -rs "$@"
