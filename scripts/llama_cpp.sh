#!/usr/bin/env bash
# Installs llama.cpp, as the npm package node-llama-cpp has it built, into an environment of its own; half a minute and
# 0.8 GB. It wants node 20 or newer with npm. Then scripts/llama_cpp.py compares it with transformers, and
# tests/test_llama_cpp.py runs.
# Variables: OLICA_LLAMA_CPP, the folder of the environment (no default); NODE_LLAMA_CPP, the version (3.22.1).
set -euo pipefail
: "${OLICA_LLAMA_CPP:?name the folder of the environment in OLICA_LLAMA_CPP}"

mkdir -p "$OLICA_LLAMA_CPP"
cd "$OLICA_LLAMA_CPP"
[ -f package.json ] || echo '{"private": true}' >package.json
# No scripts: they would look for a compiler, and the binaries are there.
npm install --no-audit --no-fund --ignore-scripts "node-llama-cpp@${NODE_LLAMA_CPP:-3.22.1}"
