#!/usr/bin/env bash
# Table 7: perplexity on WikiText-2 and accuracy on seven tasks at 50 %, of LLaMA, LLaMA-2 and Vicuna of 7B and 13B.
# Command: bash scripts/table7.sh, or MODEL=smollm2 bash scripts/table7.sh; variables in scripts/common.sh.
# Expected (paper): 49.39 / 50.68 %, 35.35 / 56.41, 52.82 / 47.57, 34.21 / 54.21, 56.35 / 49.54, 39.22 / 56.57.
# Memory and time: as table2.sh, for each model; 13B takes about twice as much; SmolLM2 13 minutes by itself.
source "$(dirname "$0")/common.sh"
for model in ${MODEL:-7b 13b llama2-7b llama2-13b vicuna-7b vicuna-13b}; do
    use "$model"
    at_sparsities 0.5
    report table7
done
