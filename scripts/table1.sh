#!/usr/bin/env bash
# Table 1: samples, time and memory of pruning LLaMA-7B by 25 and 33 %, with perplexity and mean accuracy.
# Command: bash scripts/table1.sh, or MODEL=smollm2 bash scripts/table1.sh; variables in scripts/common.sh.
# Expected (paper): 256 samples, 7 minutes, 3 GB; 16.69 / 63.53 % and 19.83 / 61.21 %.
# Memory and time: as table2.sh, whose runs it shows; SmolLM2 20 minutes by itself.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
at_sparsities 0.25 0.33
report table1
