#!/usr/bin/env bash
# Table 6: full OND against Fast-OND at 20 %: time of pruning, perplexity and mean accuracy.
# Command: bash scripts/table6.sh, or MODEL=smollm2 bash scripts/table6.sh; variables in scripts/common.sh.
# Expected (paper): LLaMA-7B OND 2910 s, 15.17, 64.32 %; Fast-OND 413 s, 15.35, 64.54 %. Ours finds the singular
#   vectors of the product without forming it, so that both take the same time.
# Memory and time: as table2.sh, which shares one of its two models; SmolLM2 20 minutes by itself.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
at_sparsities 0.2
pruned tables/sparsity-0.2_olica-ond "$TABLE_MEASURES" --sparsity 0.2 --mlp_num "$(mlp_num 0.2)" --recipe olica-ond
report table6
