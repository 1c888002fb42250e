#!/usr/bin/env bash
# Table 3: perplexity on WikiText-2 and accuracy on seven tasks of LLaMA-2-7B at 30 % and Vicuna-7B at 20 %.
# Command: bash scripts/table3.sh, or MODEL=smollm2 bash scripts/table3.sh; variables in scripts/common.sh.
# Expected (paper): LLaMA-2-7B 18.54 / 61.14 %, Vicuna-7B 20.23 / 64.88 %.
# Memory and time: as table2.sh, for each model; SmolLM2 20 minutes by itself.
source "$(dirname "$0")/common.sh"
for model in ${MODEL:-llama2-7b vicuna-7b}; do
    use "$model"
    case $model in
        llama2-7b) at_sparsities 0.3 ;;
        vicuna-7b) at_sparsities 0.2 ;;
        *) at_sparsities 0.2 0.3 ;;
    esac
    report table3
done
