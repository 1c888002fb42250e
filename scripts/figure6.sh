#!/usr/bin/env bash
# Figure 6: perplexity of LLaMA-30B over the sparsity, calibrated on BookCorpus and Alpaca or on C4 and Alpaca.
# Command: bash scripts/figure6.sh, or MODEL=smollm2 bash scripts/figure6.sh; variables in scripts/common.sh, and
#   MIXES (a space between).
# Expected (paper): little changes up to 40 %, whatever the texts; beyond, the model deteriorates.
# Memory and time: of pruning and perplexity, for each point: LLaMA-30B an hour on one card of 16 GB by the paper's page.
#   SmolLM2 with NUM_SAMPLES=32 WINDOWS=512 on one core: 1.4 GB, 3 minutes each.
source "$(dirname "$0")/common.sh"
use "${MODEL:-30b}"
position=0
for mix in ${MIXES:-$DATASETS c4+alpaca}; do
    position=$((position + 1))
    for sparsity in 0.1 0.2 0.3 0.4 0.5 0.6; do
        grid "figure6/mix-${position}_sparsity-$sparsity" \
            --datasets "$mix" --sparsity "$sparsity" --mlp_num "$(mlp_num "$sparsity")"
    done
done
report figure6
