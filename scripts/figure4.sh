#!/usr/bin/env bash
# Figure 4: perplexity of LLaMA-7B over corrected MLPs and rank of the corrections, and the parameters these add.
# Command: bash scripts/figure4.sh, or MODEL=smollm2 bash scripts/figure4.sh; variables in scripts/common.sh, and
#   SPARSITY, NUMBERS and RATIOS (a space between).
# Expected (paper): both help; little is gained beyond a ratio of 0.15 or 20 layers, which add about 1 % of parameters.
# Memory and time: of pruning and perplexity, for each cell: LLaMA-7B 8 minutes on an A100 (not run by us).
#   SmolLM2 with NUM_SAMPLES=32 WINDOWS=512 on one core: 1.4 GB, 3 minutes each.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
grid figure4/mlp_num-0 --sparsity "${SPARSITY:-0.33}" --mlp_num 0
for number in ${NUMBERS:-4 8 12 16 20 24 28}; do
    for ratio in ${RATIOS:-0.03 0.06 0.09 0.12 0.15 0.18}; do
        grid "figure4/mlp_num-${number}_ratio-$ratio" \
            --sparsity "${SPARSITY:-0.33}" --mlp_num "$number" --ratio "$ratio"
    done
done
report figure4
