#!/usr/bin/env bash
# LLaMA-13B at 20 % of Table 2: the paper prints perplexity 13.68 (128 tokens) and a mean accuracy of 67.67 %.
# Not run by us yet. Variables as in pruning_and_eval_7b.sh.
set -euo pipefail
MODEL=${MODEL:-13b} exec bash "$(dirname "$0")/pruning_and_eval_7b.sh"
