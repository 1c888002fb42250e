#!/usr/bin/env bash
# Methods beside each other, at one size, with one text: perplexity of several corpora, and the seven tasks.
# Command: bash scripts/methods.sh, or MODEL=smollm2 bash scripts/methods.sh; variables in scripts/common.sh, and
#   RECIPES     which (olica olica-grouped olica-plus)
#   SPARSITIES  of which share of what SPARSITY_OF says (0.2 0.33 0.5; of the model)
#   REFITS      what is done with what stays (recipe; also none, least-squares)
#   SEEDS       of the calibration set (0)
#   MIX         a name for DATASETS, under which the runs are recorded (paper)
#   OWN_DENSE   yes or no: whether the dense model is measured for this MIX alone, as other WINDOWS, DTYPE or LIMIT than
#               those of the other mixes want it (no)
#   PPL         corpora (wikitext2,c4,ptb)
#   SCORED      yes or no: whether the tasks are scored too (no)
#   TIMED       yes or no: whether decoding is timed too, all recipes of a sparsity in turns; it wants the machine for
#               itself, and that KEEP is yes (no)
# Memory and time: SmolLM2 on 2 cores: 1.4 GB and 4 minutes each pruning, which share a survey; 4 minutes each evaluation
#   with WINDOWS=256 and four corpora; 8 minutes each scoring with LIMIT=200.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
runs=methods/${MIX:-paper}
measures="--ppl ${PPL:-wikitext2,c4,ptb} ${WINDOWS:+--ppl_windows $WINDOWS}"
scores="--ppl none --tasks $TASKS ${LIMIT:+--limit $LIMIT}"

# decoded PRUNINGS FLAGS...: time the dense model and what these lines of flags make of it, in turns.
decoded() {
    local prunings=$1 line checkpoints=(); shift
    while read -ra line; do
        made "${line[@]}"
        checkpoints+=("$checkpoint")
    done <<< "$prunings"
    $PYTHON benchmarks/generation_speed.py --dense "$MODEL" --checkpoints "${checkpoints[@]}" --dtype "$DTYPE" \
        --device "$DEVICE" "$@"
}

of_dense=$([ "${OWN_DENSE:-no}" = no ] && echo methods || echo "$runs")
dense "$of_dense/dense" "$measures"
[ "${SCORED:-no}" = no ] || dense "$of_dense/tasks/dense" "$scores"
declare -A timed  # by sparsity, a line of flags for every pruning
for seed in ${SEEDS:-0}; do
    for recipe in ${RECIPES:-olica olica-grouped olica-plus}; do
        for sparsity in ${SPARSITIES:-0.2 0.33 0.5}; do
            for refit in ${REFITS:-recipe}; do
                name=${recipe}_sparsity-${sparsity}_seed-$seed
                # shellcheck disable=SC2207  # two words, or none
                flags=(--recipe "$recipe" --sparsity "$sparsity" --seed "$seed" $(corrections "$recipe" "$sparsity"))
                if [ "$refit" != recipe ]; then
                    name+=_refit-$refit
                    flags+=(--refit "$refit")
                fi
                pruned "$runs/$name" "$measures" "${flags[@]}"
                [ "${SCORED:-no}" = no ] || pruned "$runs/tasks/$name" "$scores" "${flags[@]}"
                timed[$sparsity]+=${flags[*]}$'\n'
            done
        done
    done
done
[ "${TIMED:-no}" = yes ] || timed=()
for sparsity in "${!timed[@]}"; do
    is="$(pruning_of), in $DTYPE, of"$'\n'${timed[$sparsity]%$'\n'}
    once "$RECORDS/$runs/generation_speed_$sparsity" "$is" decoded "${timed[$sparsity]%$'\n'}"
done
report methods
