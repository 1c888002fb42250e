#!/usr/bin/env bash
# Figure 5: perplexity of LLaMA-7B over the number of calibration samples of 128 tokens, and over the length of 128.
# Command: bash scripts/figure5.sh, or MODEL=smollm2 bash scripts/figure5.sh; variables in scripts/common.sh, and
#   SPARSITY, SAMPLES and LENGTHS (a space between), LENGTH_SAMPLES (how many of every length), TEXT (the paper takes
#   C4, whose documents are long enough).
# Expected (paper): little depends on either; over 8 to 2048 samples, or tokens, the perplexity moves by 2.4 at most.
# Memory and time: of pruning and perplexity, for each point; the hidden states of 128 x 2048 tokens take 2 GB at 7B.
#   SmolLM2 with WINDOWS=512 and 64 samples of 128 tokens, on one core: 1.4 GB, 3 minutes each.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
at=(--sparsity "${SPARSITY:-0.33}" --datasets "${TEXT:-c4}")
for number in ${SAMPLES:-8 32 128 512 2048}; do
    grid "figure5/num_samples/$number" "${at[@]}" --num_samples "$number"
done
for length in ${LENGTHS:-8 32 128 512 2048}; do
    grid "figure5/seqlen/$length" "${at[@]}" --num_samples "${LENGTH_SAMPLES:-128}" --seqlen "$length"
done
report figure5
