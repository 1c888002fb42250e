#!/usr/bin/env bash
# Installs and runs the tests: no hub, no GPU, no data needed. About 9 minutes on 2 cores, of which the tests are 7.
# Variables: OLICA_DATA, a folder of real text and evaluation sets, lets the tests that want it run; WORKERS (2), how many
#   processes share the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # tiny matrices gain nothing from a second thread
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
.venv/bin/python -m pytest -rs --durations=10 -n "${WORKERS:-2}" --dist loadfile "$@"
