#!/usr/bin/env bash
# What people compare a pruned model with: the dense model, what a short LoRA makes of each, both in 4 bits and, where
# there is one, a smaller dense model of the family. Perplexity by windows of 128 and of 2048 tokens, and whether an
# instruction model still chats.
# Command: bash scripts/compare.sh, or MODEL=smollm2 bash scripts/compare.sh; variables in scripts/common.sh, and
#   SPARSITIES   of which share of what SPARSITY_OF says (0.2 0.33; here of the decoder layers)
#   RECIPE       which (olica-plus)
#   PPL          corpora (wikitext2,c4)
#   LORA_SAMPLES of each text of DATASETS that the LoRA is trained on (NUM_SAMPLES)
#   SMALLER      a smaller dense model of the family (without it there is no such row)
#   FOUR_BITS    yes or no: whether there are rows in 4 bits, which want bitsandbytes (yes)
#   CHAT         yes or no: whether the models are asked twenty prompts (yes; no for models without a chat template)
# WINDOWS are of 128 tokens; of 2048 tokens there are as many as hold that text, and they are measured one at a time.
# Memory and time: SmolLM2 on 2 cores: some ten minutes each LoRA, two minutes each chat; else as scripts/methods.sh.
SPARSITY_OF=${SPARSITY_OF:-layers}
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
training="--datasets $DATASETS --num_samples ${LORA_SAMPLES:-$NUM_SAMPLES}$START"

# measures LENGTH: the perplexity by windows of so many tokens.
measures() {
    local windows=${WINDOWS:+$(((WINDOWS * 128 + $1 - 1) / $1))}
    echo "--ppl ${PPL:-wikitext2,c4} --ppl_seqlen $1 ${windows:+--ppl_windows $windows}"
}

# at_hand KIND: have the checkpoint that MODEL and `flags` say, retrained where that is the kind; sets `checkpoint`.
at_hand() {
    checkpoint=$MODEL
    [ ${#flags[@]} = 0 ] || made "${flags[@]}"
    [ "$1" = lora ] || return 0
    local folder; folder=$(folder_of --lora "${flags[@]}")
    if ! recorded "$is" "$folder/flags" "$folder/checkpoint/lora_run.json"; then
        rm -rf "$folder"
        # shellcheck disable=SC2086
        $PYTHON benchmarks/lora.py --checkpoint "$checkpoint" $training --data_dir "$DATA_DIR" --device "$DEVICE" \
            --output_path "$folder/checkpoint"
        echo "$is" > "$folder/flags"
    fi
    checkpoint=$folder/checkpoint
}

# measured KIND LENGTH FOLDER: write FOLDER/evaluation.json, beside it what was done to the model.
measured() {
    local batch=${EVALUATION_BATCH_SIZE:-$BATCH_SIZE}
    [ "$2" = 128 ] || batch=1
    at_hand "$1"
    if [ "$1" = four-bits ]; then
        # shellcheck disable=SC2046
        $PYTHON benchmarks/quantised.py --checkpoint "$checkpoint" $(measures "$2")$START --data_dir "$DATA_DIR" \
            --device "$DEVICE" --batch_size "$batch" --output_path "$3/evaluation.json"
    else
        EVALUATION_BATCH_SIZE=$batch evaluate "$checkpoint" "$3" "$(measures "$2")"
    fi
    [ ${#flags[@]} = 0 ] || cp "$checkpoint/olica_run.json" "$3/pruning.json"
    [ "$1" != lora ] || cp "$checkpoint/lora_run.json" "$3/lora.json"
}

# asked KIND FOLDER: write FOLDER/chat.json.
asked() {
    local further=()
    [ "$1" != four-bits ] || further=(--four_bits)
    at_hand "$1"
    $PYTHON benchmarks/chat.py --checkpoint "$checkpoint" "${further[@]}" --device "$DEVICE" --dtype "$DTYPE" \
        --output_path "$2/chat.json"
}

# within FOLDER RECORD FLAGS COMMAND...: have a command write a record into a folder, unless the flags there are these.
within() {
    local folder=$1 record=$2 flags_now=$3; shift 3
    recorded "$flags_now" "$folder/flags" "$folder/$record" && return
    rm -f "$folder/flags"
    mkdir -p "$folder"
    "$@" "$folder"
    echo "$flags_now" > "$folder/flags"
}

# row KIND NAME: all measures of what MODEL and `flags` say, as it is (plain), retrained (lora) or in four-bits.
row() {
    local is="--base_model $MODEL$START" length
    [ ${#flags[@]} = 0 ] || is=$(pruning_of "${flags[@]}")
    case $1 in
        lora) is+=" LoRA $training" ;;
        four-bits) is+=" 4 bits" ;;
    esac
    for length in 128 2048; do
        within "$RECORDS/compare/$length/$2" evaluation.json "$is --dtype $DTYPE $(measures $length)" \
            measured "$1" "$length"
    done
    [ "${CHAT:-yes}" = no ] || within "$RECORDS/compare/chat/$2" chat.json "$is --dtype $DTYPE" asked "$1"
}

# rows NAME: the model as it is, retrained and in 4 bits.
rows() {
    row plain "$1"
    row lora "lora/$1"
    [ "${FOUR_BITS:-yes}" = no ] || row four-bits "four-bits/$1"
}

flags=()
rows dense
[ -z "${SMALLER:-}" ] || MODEL=$SMALLER row plain smaller/dense
for sparsity in ${SPARSITIES:-0.2 0.33}; do
    flags=(--recipe "${RECIPE:-olica-plus}" --sparsity "$sparsity" --seed 0)
    rows "sparsity-$sparsity"
done
report compare
