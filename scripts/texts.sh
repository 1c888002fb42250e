#!/usr/bin/env bash
# What the calibration text does: recipes calibrated on one kind of text each, measured on all kinds.
# Command: bash scripts/texts.sh, or MODEL=smollm2 bash scripts/texts.sh; variables in scripts/common.sh but DATASETS, and
#   TEXTS       what to calibrate on, NAME=DATASETS each (prose, instructions, web, code, encyclopaedia, all of them)
#   RECIPES     which (olica olica-plus)
#   SPARSITY    share of what SPARSITY_OF says (0.2)
#   PPL         corpora to measure on (wikitext2, C4, PTB, held-back novels, held-back instructions, held-back modules)
# The files are those that scripts/split_texts.py writes, into DATA_DIR, and of a data folder; the modules are those of
# the Python that runs.
# NUM_SAMPLES are taken of all texts together, so that a mix is no larger than a single text.
# Memory and time: SmolLM2 on 2 cores: 1.4 GB; 5 minutes each survey, 3 each pruning and 6 each evaluation with WINDOWS=256.
NUM_SAMPLES=${NUM_SAMPLES:-240}
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
prose=$DATA_DIR/novels_calibrate.jsonl instructions=$DATA_DIR/instructions_calibrate.jsonl
web=$DATA_DIR/openwebtext_1000.jsonl.gz encyclopaedia=$DATA_DIR/wikitext2_raw_train_slice.jsonl
TEXTS=${TEXTS:-prose=$prose instructions=$instructions web=$web code=pysource encyclopaedia=$encyclopaedia
    all=$prose+$instructions+$web+pysource+$encyclopaedia}
held_back=$DATA_DIR/novels_report.jsonl,$DATA_DIR/instructions_report.jsonl,pysource
measures="--ppl ${PPL:-wikitext2,$DATA_DIR/c4_report.jsonl,ptb,$held_back} ${WINDOWS:+--ppl_windows $WINDOWS}"
samples=$NUM_SAMPLES sparsity=${SPARSITY:-0.2}

dense texts/dense "$measures"
for text in $TEXTS; do
    DATASETS=${text#*=}
    parts=${DATASETS//[!+]/}
    NUM_SAMPLES=$((samples / (${#parts} + 1)))
    for recipe in ${RECIPES:-olica olica-plus}; do
        # shellcheck disable=SC2207  # two words, or none
        flags=(--recipe "$recipe" --sparsity "$sparsity" $(corrections "$recipe" "$sparsity"))
        KEEP=${KEEP:-no} pruned "texts/${text%%=*}_$recipe" "$measures" "${flags[@]}"
    done
done
report texts
