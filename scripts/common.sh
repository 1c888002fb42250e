# shellcheck shell=bash
# What the scripts of tables and figures share; they source it. Variables, all to be set from outside:
#   MODEL       what to prune: a name, hub id or folder; each script has its own default, the paper's models
#   LABEL       its folder in RESULTS (default: the last part of MODEL); 7b, 13b, llama2-7b, ... have the paper's figures
#   DATASETS    calibration texts (bookcorpus+alpaca; without a hub and local copies for example pydoc)
#   NUM_SAMPLES of each text (128)
#   MLP_NUM     how many MLPs are corrected (default: 6, 12 or 16 by the sparsity; fewer layers want fewer)
#   DATA_DIR    folder that is searched first for texts and for rows of the tasks (./data)
#   DEVICE      auto, cpu or cuda
#   DTYPE       to evaluate in (auto: as stored)
#   PRUNING_DTYPE  to prune and save in (auto: as stored); bfloat16 is faster where the processor has it
#   START_TOKEN yes or no: whether samples and windows begin with the start token, which Gemma wants (no)
#   SPARSITY_OF what sparsities are a share of: model or layers (model)
#   TASKS       zero-shot tasks where no table of the paper wants its seven: some of these, joined by commas (all)
#   LIMIT       rows of every task (default: all)
#   WINDOWS     of every text (default: all)
#   BATCH_SIZE  samples, windows or prompts at a time (16); EVALUATION_BATCH_SIZE of them in an evaluation (the same)
#   RESULTS     folder of the records (results); SAVE_DIR folder of the checkpoints (./pruned_models)
#   KEEP        yes or no: whether checkpoints stay when they are measured (tables: yes, figures: no)
#   PYTHON      made by scripts/install.sh
# Relative paths are relative to the repository. What is recorded by the same flags is not run again, and what was stopped
# is taken up; DATA_DIR, DEVICE and batch sizes are no such flags: for other data or another machine give other RESULTS.
# Runs of one model, text and recipe share a survey in DATA_DIR; the times that scripts name are of runs that each made one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DATASETS=${DATASETS:-bookcorpus+alpaca}
NUM_SAMPLES=${NUM_SAMPLES:-128}
DATA_DIR=${DATA_DIR:-./data}
DEVICE=${DEVICE:-auto}
DTYPE=${DTYPE:-auto}
PRUNING_DTYPE=${PRUNING_DTYPE:-auto}
SPARSITY_OF=${SPARSITY_OF:-model}
START=$([ "${START_TOKEN:-no}" = no ] || echo " --add_bos_token")
LIMIT=${LIMIT:-}
WINDOWS=${WINDOWS:-}
BATCH_SIZE=${BATCH_SIZE:-16}
RESULTS=${RESULTS:-results}
SAVE_DIR=${SAVE_DIR:-./pruned_models}
PYTHON=${PYTHON:-.venv/bin/python}
PAPERS_TASKS=openbookqa,arc_easy,winogrande,hellaswag,arc_challenge,piqa,boolq
TASKS=${TASKS:-$PAPERS_TASKS}

# one_word VARIABLE: refuse a value with a space in it, which would become two flags.
one_word() {
    case ${!1:-} in *[[:space:]]*) echo "$1=${!1} has a space in it, which these scripts do not take" >&2; exit 2 ;; esac
}

for variable in DATASETS DATA_DIR PPL RESULTS SAVE_DIR TASKS; do one_word $variable; done
for task in ${TASKS//,/ }; do
    case ,$PAPERS_TASKS, in
        *,"$task",*) ;;
        *) echo "TASKS=$TASKS: $task is none of $PAPERS_TASKS" >&2; exit 2 ;;
    esac
done

PERPLEXITY="--ppl wikitext2 ${WINDOWS:+--ppl_windows $WINDOWS}"
TABLE_MEASURES="$PERPLEXITY --tasks $PAPERS_TASKS ${LIMIT:+--limit $LIMIT}"

# use MODEL: the model that follows, and where its records go.
use() {
    if [ -n "${LABEL:-}" ] && [ -n "${RECORDS:-}" ]; then
        echo "LABEL=$LABEL cannot be the folder of two models; give MODEL too" >&2
        exit 2
    fi
    MODEL=$1
    one_word MODEL
    RECORDS=$RESULTS/${LABEL:-$(basename "$MODEL")}
}

# recorded FLAGS FILE...: whether the first file says that these flags were run, if need be with more texts of --ppl
# behind the same ones, and the others are there.
recorded() {
    local flags=$1 run texts file
    [ -f "$2" ] || return
    run=$(<"$2") texts=$(sed -n 's/.*--ppl \([^ ]*\).*/\1/p' <<< "$flags")
    [ "$run" = "$flags" ] || [ "$(sed "s|--ppl $texts,[^ ]*|--ppl $texts|" <<< "$run")" = "$flags" ] || return
    for file in "${@:3}"; do [ -e "$file" ] || return; done
    echo "${2%/*} is recorded"
}

# recorded_before FLAGS RUN: the same of flags from before --sparsity_of, unless `olica` then had other shares for this model:
# its queries and keys lost different ones, or none.
recorded_before() {
    [ -f "$2/pruning.json" ] || return
    local shares query key
    shares=$(sed -n '/"shares_removed"/,/}/p' "$2/pruning.json")
    query=$(sed -n 's/.*"query": \([^,]*\).*/\1/p' <<< "$shares")
    key=$(sed -n 's/.*"key": \([^,]*\).*/\1/p' <<< "$shares")
    [ "$query" = "$key" ] && [ "$query" != 0.0 ] || return
    recorded "${1/ --sparsity_of model/}" "$2/flags" "$2/evaluation.json"
}

# dense NAME MEASURES: measure the dense model.
dense() {
    local out=$RECORDS/$1 flags="--base_model $MODEL --dtype $DTYPE $2$START"
    recorded "$flags" "$out/flags" "$out/evaluation.json" && return
    rm -f "$out/flags"
    evaluate "$MODEL" "$out" "$2"
    echo "$flags" > "$out/flags"
}

# folder_of FLAGS...: the folder below which `pruned` has the checkpoint.
folder_of() { echo "$SAVE_DIR/${RECORDS##*/}$(printf '%s' "$*" | tr -cs 'A-Za-z0-9._+' '-')"; }

# pruning_of FLAGS...: all flags of a pruning that decide what comes of it.
pruning_of() {
    local dtype=
    [ "$PRUNING_DTYPE" = auto ] || dtype=" --dtype $PRUNING_DTYPE"
    echo "--base_model $MODEL --datasets $DATASETS --num_samples $NUM_SAMPLES --sparsity_of $SPARSITY_OF $*$START$dtype"
}

# pruned NAME MEASURES FLAGS...: prune with these flags, unless that is done for another table, and measure the result.
pruned() {
    local out=$RECORDS/$1 measures=$2; shift 2
    local pruning; pruning=$(pruning_of "$@")
    local flags="$pruning --dtype $DTYPE $measures" keep=${KEEP:-yes}
    recorded "$flags" "$out/flags" "$out/evaluation.json" "$out/pruning.json" && return
    recorded_before "$flags" "$out" && return
    rm -f "$out/flags"
    local folder; folder=$(folder_of "$@")
    if ! recorded "$pruning" "$folder/flags"; then
        prune "$folder" "$pruning"
    elif [ ! -f "$folder/temporary" ]; then
        keep=yes  # a table's
    fi
    [ "$keep" = no ] || rm -f "$folder/temporary"
    evaluate "$(echo "$folder"/*/)" "$out" "$measures"
    cp "$folder"/*/olica_run.json "$out/pruning.json"
    echo "$flags" > "$out/flags"
    [ "$keep" = yes ] || rm -r "$folder"
}

# made FLAGS...: prune with these flags, unless that is done, and keep it; sets `checkpoint` to its folder.
made() {
    local folder pruning
    folder=$(folder_of "$@") pruning=$(pruning_of "$@")
    recorded "$pruning" "$folder/flags" || prune "$folder" "$pruning"
    rm -f "$folder/temporary"
    checkpoint=$(echo "$folder"/*/)
}

# grid NAME FLAGS...: a run of a figure, of which the perplexity is measured and, unless KEEP says so, nothing is kept.
grid() {
    local name=$1; shift
    KEEP=${KEEP:-no} pruned "$name" "$PERPLEXITY" "$@"
}

# prune FOLDER FLAGS: prune into a folder below, in place of what other flags made; what was stopped goes on.
prune() {
    [ ! -f "$1/flags" ] || rm -r "$1"
    # shellcheck disable=SC2086  # the flags are several words
    $PYTHON model_pruning.py $2 --data_dir "$DATA_DIR" --device "$DEVICE" --batch_size "$BATCH_SIZE" \
        --save_dir "$1" --overwrite
    touch "$1/temporary"  # until a table wants it
    echo "$2" > "$1/flags"
}

# evaluate MODEL FOLDER MEASURES: write FOLDER/evaluation.json.
evaluate() {
    mkdir -p "$2"
    # shellcheck disable=SC2086
    $PYTHON model_evaluate.py --checkpoint "$1" $3$START --data_dir "$DATA_DIR" --device "$DEVICE" --dtype "$DTYPE" \
        --batch_size "${EVALUATION_BATCH_SIZE:-$BATCH_SIZE}" --output_path "$2/evaluation.json"
}

# mlp_num SPARSITY: how many MLPs are corrected; the paper takes 6, 12 or 16 and does not say which where.
mlp_num() {
    [ -z "${MLP_NUM:-}" ] || { echo "$MLP_NUM"; return; }
    awk -v sparsity="$1" 'BEGIN { print sparsity <= 0.25 ? 6 : sparsity <= 0.4 ? 12 : 16 }'
}

# corrections RECIPE SPARSITY: the flag that says how many MLPs are corrected, for the recipes that correct some.
corrections() {
    case $1 in
        olica-plus) ;;
        olica*) echo "--mlp_num $(mlp_num "$2")" ;;
    esac
}

# at_sparsities SPARSITY...: dense model and olica at these sparsities, as tables 1, 2, 3 and 7 show them.
at_sparsities() {
    dense tables/dense "$TABLE_MEASURES"
    for sparsity in "$@"; do
        pruned "tables/sparsity-$sparsity" "$TABLE_MEASURES" --sparsity "$sparsity" --mlp_num "$(mlp_num "$sparsity")"
    done
}

# once STEM FLAGS COMMAND...: have a command write STEM.json, unless STEM.flags says that these flags made it.
once() {
    local stem=$1 is=$2; shift 2
    recorded "$is" "$stem.flags" "$stem.json" && return
    rm -f "$stem.flags"
    "$@" --output_path "$stem.json"
    echo "$is" > "$stem.flags"
}

# report NAME: print a table, or draw a figure, from the records.
report() { $PYTHON scripts/report.py "$1" --results "$RESULTS" --only "${RECORDS##*/}"; }
