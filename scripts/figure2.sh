#!/usr/bin/env bash
# Figure 2: singular values of the query, key, value and output projections of LLaMA-7B.
# Command: bash scripts/figure2.sh, or MODEL=smollm2 bash scripts/figure2.sh; variables in scripts/common.sh, and LAYERS.
# Expected (paper): query and key alike and falling fast, value and output alike and falling slowly.
# Memory and time: two decoder layers; a minute for each layer of LLaMA-7B, seconds for SmolLM2.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
[ -f "$RECORDS/figure2.json" ] || $PYTHON scripts/singular_values.py --base_model "$MODEL" \
    ${LAYERS:+--layers "$LAYERS"} --output_path "$RECORDS/figure2.json"
report figure2
