#!/usr/bin/env bash
# Table 2: perplexity on WikiText-2 and accuracy on seven tasks of LLaMA-7B at 20, 25 and 33 % and LLaMA-13B at 20 %.
# Command: bash scripts/table2.sh, or MODEL=smollm2 bash scripts/table2.sh; variables in scripts/common.sh.
# Expected (paper): 7B 12.63 / 66.09 % dense; 15.35 / 64.54, 16.69 / 63.54, 19.83 / 61.21; 13B 13.68 / 67.67 at 20 %.
# Memory and time: each pruning of 7B 3 GB of GPU memory and 7 minutes on an A100 by the paper; to evaluate, its weights
#   (13.5 GB dense) and the log-probabilities of a batch of prompts; neither run by us. SmolLM2 with LIMIT=200
#   DTYPE=bfloat16 on 2 cores: each pruning 1.4 GB and 2.5 minutes, each evaluation 5 minutes, 28 minutes in all.
source "$(dirname "$0")/common.sh"
for model in ${MODEL:-7b 13b}; do
    use "$model"
    if [ "$model" = 13b ]; then at_sparsities 0.2; else at_sparsities 0.2 0.25 0.33; fi
    report table2
done
