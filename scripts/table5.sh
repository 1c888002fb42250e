#!/usr/bin/env bash
# Table 5: Fast-OND against SVD, activation-weighted SVD and Wanda on value and output projections at 33 %, without
#   and with corrections.
# Command: bash scripts/table5.sh, or MODEL=smollm2 bash scripts/table5.sh; variables in scripts/common.sh, and SPARSITY.
# Expected (paper): LLaMA-7B without 71.01 / 25.78 / 20.94 / 20.34, with 63.48 / 24.72 / 20.40 / 19.83.
# Memory and time: as table2.sh, which shares one of its eight models; SmolLM2 an hour.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
SPARSITY=${SPARSITY:-0.33}
for mlp_num in 0 "$(mlp_num "$SPARSITY")"; do
    for recipe in olica-svd olica-awsvd olica-wanda; do
        pruned "tables/sparsity-${SPARSITY}_mlp_num-${mlp_num}_$recipe" "$TABLE_MEASURES" \
            --sparsity "$SPARSITY" --mlp_num "$mlp_num" --recipe "$recipe"
    done
done
pruned "tables/sparsity-${SPARSITY}_mlp_num-0" "$TABLE_MEASURES" --sparsity "$SPARSITY" --mlp_num 0
at_sparsities "$SPARSITY"
report table5
