#!/usr/bin/env bash
# LLaMA-7B at 20 % of Table 2: the paper prints perplexity 15.35 (128 tokens) and a mean accuracy of 64.54 %,
# 413 s and 3 GB of GPU memory. Not run by us yet. Variables: MODEL, SPARSITY, SAVE_DIR, DATA_DIR, DEVICE, LIMIT (rows of
# every task; default: all), PYTHON. What is pruned and measured already is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-7b}
SPARSITY=${SPARSITY:-0.2}
SAVE_DIR=${SAVE_DIR:-./pruned_models}
DATA_DIR=${DATA_DIR:-./data}
DEVICE=${DEVICE:-auto}
PYTHON=${PYTHON:-.venv/bin/python}  # made by scripts/install.sh
# Where the commands themselves put the checkpoint.
folder=$("$PYTHON" -c '
import sys
from olica import errors
from olica.outputs.names import checkpoint_folder
from olica.sources.locate import locate
save_dir, model, sparsity = sys.argv[1:]
try:
    print(checkpoint_folder(save_dir, locate(model).label, float(sparsity)))
except errors.UsageError as error:
    sys.exit(str(error))
' "$SAVE_DIR" "$MODEL" "$SPARSITY")
record=$folder/olica_eval_${LIMIT:-all}_rows.json

[ -d "$folder" ] || "$PYTHON" model_pruning.py \
    --base_model "$MODEL" \
    --datasets bookcorpus+alpaca \
    --num_samples 128 \
    --seqlen 128 \
    --percdamp 0.5 \
    --mlp_num 6 \
    --sparsity "$SPARSITY" \
    --ratio 0.03 \
    --k 3 \
    --data_dir "$DATA_DIR" \
    --device "$DEVICE" \
    --save_dir "$SAVE_DIR"

if [ -f "$record" ]; then
    echo "$record is the record; remove it to measure again"
    exit
fi
"$PYTHON" model_evaluate.py \
    --base_model "$MODEL" \
    --sparsity "$SPARSITY" \
    --tasks openbookqa,arc_easy,winogrande,hellaswag,arc_challenge,piqa,boolq \
    ${LIMIT:+--limit "$LIMIT"} \
    --output_path "$record" \
    --data_dir "$DATA_DIR" \
    --device "$DEVICE" \
    --save_dir "$SAVE_DIR"
