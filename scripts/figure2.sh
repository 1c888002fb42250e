#!/usr/bin/env bash
# Figure 2: singular values of the query, key, value and output projections of LLaMA-7B.
# Command: bash scripts/figure2.sh, or MODEL=smollm2 bash scripts/figure2.sh; variables in scripts/common.sh, and LAYERS.
# Expected (paper): query and key alike and falling fast, value and output alike and falling slowly.
# Memory and time: two decoder layers; a minute for each layer of LLaMA-7B, seconds for SmolLM2.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
out=$RECORDS/figure2 flags="--base_model $MODEL ${LAYERS:+--layers $LAYERS}"
if ! recorded "$flags" "$out/flags" "$out/singular_values.json"; then
    rm -f "$out/flags"
    # shellcheck disable=SC2086  # the flags are several words
    $PYTHON scripts/singular_values.py $flags --device "$DEVICE" --output_path "$out/singular_values.json"
    echo "$flags" > "$out/flags"
fi
report figure2
