#!/usr/bin/env bash
# Table 4: parameters, multiply-accumulates, memory and latency of LLaMA-7B, dense and at 20, 25 and 33 %.
# Command: bash scripts/table4.sh, or MODEL=smollm2 bash scripts/table4.sh; variables in scripts/common.sh.
# Expected (paper): 6.74, 5.39, 5.01, 4.52 billion; 424, 373, 360, 340 G; 12.6, 10.2, 9.5, 8.5 GiB; 47, 41, 39, 36 s
#   for the test set of WikiText-2 on an RTX 4090.
# Memory and time: that of the model, and a few minutes each beside the pruning, which table2.sh shares; SmolLM2 1.5 GB
#   and 20 minutes with the pruning. For times that are to be compared take a machine that does nothing else, or
#   benchmarks/generation_speed.py, which lets the models take turns.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
dense table4/dense "$PERPLEXITY --cost"
for sparsity in 0.2 0.25 0.33; do
    pruned "table4/sparsity-$sparsity" "$PERPLEXITY --cost" --sparsity "$sparsity" --mlp_num "$(mlp_num "$sparsity")"
done
report table4
