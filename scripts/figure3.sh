#!/usr/bin/env bash
# Figure 3: perplexity of LLaMA-7B over the number of corrected MLPs, and the multiple correlation of every layer.
# Command: bash scripts/figure3.sh, or MODEL=smollm2 bash scripts/figure3.sh; variables in scripts/common.sh, and
#   SPARSITY and NUMBERS (a space between).
# Expected (paper): the perplexity falls and then stays; shallow layers have the highest correlation.
# Memory and time: of pruning and perplexity, for each number: LLaMA-7B 8 minutes on an A100 (not run by us).
#   SmolLM2 with NUM_SAMPLES=32 WINDOWS=512 on one core: 1.4 GB, 3 minutes each.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
for number in ${NUMBERS:-0 4 8 12 16 20 24 28}; do
    grid "figure3/mlp_num-$number" --sparsity "${SPARSITY:-0.33}" --mlp_num "$number"
done
report figure3
