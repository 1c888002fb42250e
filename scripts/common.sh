# What the scripts of tables and figures share; they source it. Variables, all to be set from outside:
#   MODEL       what to prune: a name, hub id or folder; each script has its own default, the paper's models
#   LABEL       its name in RESULTS (default: the last part of MODEL)
#   DATASETS    calibration texts (bookcorpus+alpaca), NUM_SAMPLES of each (128)
#   DATA_DIR    folder that is searched first for texts and for rows of the tasks (./data)
#   DEVICE      auto, cpu or cuda
#   DTYPE       to evaluate in (auto: as stored); models are pruned and saved as they are stored
#   LIMIT       rows of every task (default: all); WINDOWS of every text (default: all)
#   BATCH_SIZE  samples, windows or prompts at a time (16)
#   RESULTS     folder of the records (results); SAVE_DIR folder of the checkpoints (./pruned_models)
#   KEEP        yes or no: whether checkpoints stay when they are measured (tables: yes, figures: no)
#   PYTHON      made by scripts/install.sh
# What is recorded by the same flags is not run again, and what was stopped is taken up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DATASETS=${DATASETS:-bookcorpus+alpaca}
NUM_SAMPLES=${NUM_SAMPLES:-128}
DATA_DIR=${DATA_DIR:-./data}
DEVICE=${DEVICE:-auto}
DTYPE=${DTYPE:-auto}
LIMIT=${LIMIT:-}
WINDOWS=${WINDOWS:-}
BATCH_SIZE=${BATCH_SIZE:-16}
RESULTS=${RESULTS:-results}
SAVE_DIR=${SAVE_DIR:-./pruned_models}
PYTHON=${PYTHON:-.venv/bin/python}
TASKS=openbookqa,arc_easy,winogrande,hellaswag,arc_challenge,piqa,boolq

PERPLEXITY="--ppl wikitext2 ${WINDOWS:+--ppl_windows $WINDOWS}"
TABLE_MEASURES="$PERPLEXITY --tasks $TASKS ${LIMIT:+--limit $LIMIT}"

# use MODEL: the model that follows, and where its records go.
use() {
    MODEL=$1
    RECORDS=$RESULTS/${LABEL:-$(basename "$MODEL")}
}

# recorded FILE FLAGS: whether the file says that these flags were run.
recorded() { [ -f "$1" ] && [ "$(<"$1")" = "$2" ]; }

# dense NAME MEASURES: measure the dense model.
dense() {
    local out=$RECORDS/$1 flags="--base_model $MODEL --dtype $DTYPE $2"
    recorded "$out/flags" "$flags" && { echo "$out is recorded"; return; }
    evaluate "$MODEL" "$out" "$2"
    echo "$flags" > "$out/flags"
}

# pruned NAME MEASURES FLAGS...: prune with these flags, unless that is done for another table, and measure the result.
pruned() {
    local out=$RECORDS/$1 measures=$2; shift 2
    local pruning="--base_model $MODEL --datasets $DATASETS --num_samples $NUM_SAMPLES $*"
    local flags="$pruning --dtype $DTYPE $measures"
    local folder; folder=$SAVE_DIR/${RECORDS##*/}$(printf '%s' "$*" | tr -cs 'A-Za-z0-9._+' '-')
    recorded "$out/flags" "$flags" && { echo "$out is recorded"; return; }
    prune "$folder" "$pruning"
    evaluate "$(echo "$folder"/*/)" "$out" "$measures"
    cp "$folder"/*/olica_run.json "$out/pruning.json"
    echo "$flags" > "$out/flags"
    [ "${KEEP:-yes}" = yes ] || rm -r "$folder"
}

# grid NAME FLAGS...: a run of a figure, of which the perplexity is measured and, unless KEEP says so, nothing is kept.
grid() {
    local name=$1; shift
    KEEP=${KEEP:-no} pruned "$name" "$PERPLEXITY" "$@"
}

# prune FOLDER FLAGS: prune into a folder below, unless that is done; what was stopped goes on.
prune() {
    recorded "$1/flags" "$2" && return
    # shellcheck disable=SC2086  # the flags are several words
    $PYTHON model_pruning.py $2 --data_dir "$DATA_DIR" --device "$DEVICE" --batch_size "$BATCH_SIZE" \
        --save_dir "$1" --overwrite
    echo "$2" > "$1/flags"
}

# evaluate MODEL FOLDER MEASURES: write FOLDER/evaluation.json.
evaluate() {
    mkdir -p "$2"
    # shellcheck disable=SC2086
    $PYTHON model_evaluate.py --checkpoint "$1" $3 --data_dir "$DATA_DIR" --device "$DEVICE" --dtype "$DTYPE" \
        --batch_size "$BATCH_SIZE" --output_path "$2/evaluation.json"
}

# mlp_num SPARSITY: how many MLPs are calibrated; the paper takes 6, 12 or 16 and does not say which where.
mlp_num() {
    case $1 in
        0.1 | 0.2 | 0.25) echo 6 ;;
        0.3 | 0.33 | 0.4) echo 12 ;;
        *) echo 16 ;;
    esac
}

# at_sparsities SPARSITY...: dense model and olica at these sparsities, as tables 1, 2, 3 and 7 show them.
at_sparsities() {
    dense tables/dense "$TABLE_MEASURES"
    for sparsity in "$@"; do
        pruned "tables/sparsity-$sparsity" "$TABLE_MEASURES" --sparsity "$sparsity" --mlp_num "$(mlp_num "$sparsity")"
    done
}

# report NAME: print a table, or draw a figure, from the records.
report() { $PYTHON scripts/report.py "$1" --results "$RESULTS" --only "${RECORDS##*/}"; }
