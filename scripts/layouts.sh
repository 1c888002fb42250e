#!/usr/bin/env bash
# Layouts of checkpoints beside each other: one recipe, at one size, with one text; perplexity, bytes, and the speed of
# prefill and decoding in transformers and, where it is installed, in llama.cpp.
# Command: bash scripts/layouts.sh, or MODEL=smollm2 bash scripts/layouts.sh; variables in scripts/common.sh, and
#   SPARSITIES      of which share of what SPARSITY_OF says (0.2 0.33; of the model)
#   RECIPE          which (olica-plus)
#   PPL             corpora (wikitext2,c4)
#   OLICA_LLAMA_CPP what scripts/llama_cpp.sh made (without it llama.cpp is left out)
# Sizes are no multiples of anything, so that all are equal: speed is that of such sizes, in llama.cpp in float16. In Q8_0
# it is that of the layouts' own sizes, multiples of 32, at the first sparsity.
# Memory and time: SmolLM2 on 2 cores: 1.6 GB and an hour with WINDOWS=256; speed wants the machine for itself.
KEEP=yes  # what is timed
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
measures="--ppl ${PPL:-wikitext2,c4} ${WINDOWS:+--ppl_windows $WINDOWS}"
recipe=${RECIPE:-olica-plus}
SPARSITIES=${SPARSITIES:-0.2 0.33}
out=$RECORDS/layouts

dense layouts/dense "$measures"
checkpoints=() prunings=
for sparsity in $SPARSITIES; do
    for layout in olica stock deci; do
        flags=(--recipe "$recipe" --sparsity "$sparsity" --seed 0 --round_to 1 --layout "$layout")
        # Where a record is there without its checkpoint, both are made again.
        [ -d "$(folder_of "${flags[@]}")" ] || rm -f "$out/${layout}_sparsity-$sparsity/flags"
        pruned "layouts/${layout}_sparsity-$sparsity" "$measures" "${flags[@]}"
        checkpoints+=("$(echo "$(folder_of "${flags[@]}")"/*/)")
        prunings+=$'\n'$(pruning_of "${flags[@]}")
    done
done
once "$out/generation_speed" "in $DTYPE, of$prunings" $PYTHON benchmarks/generation_speed.py --dense "$MODEL" \
    --checkpoints "${checkpoints[@]}" --dtype "$DTYPE" --device "$DEVICE"

# timed TYPE CHECKPOINT...: the speed of the dense model and of what llama.cpp can read of these, as files of a type.
timed() {
    local type=$1 files=() checkpoint; shift
    for checkpoint in "$MODEL" "$@"; do
        case $checkpoint in *_layout-* | "$MODEL") ;; *) continue ;; esac
        files+=("$SAVE_DIR/${RECORDS##*/}-gguf-$type/$(basename "$checkpoint").gguf")
        # A file that is older than the checkpoint is of another one that was there.
        [ -f "${files[-1]}" ] && [ ! "$checkpoint" -nt "${files[-1]}" ] ||
            $PYTHON model_export.py "$checkpoint" --gguf "$type" --output_path "${files[-1]}" --overwrite
    done
    once "$out/llama_cpp_speed_$type" "of$prunings" $PYTHON scripts/llama_cpp_speed.py "${files[@]}"
}

if [ -n "${OLICA_LLAMA_CPP:-}" ]; then
    timed f16 "${checkpoints[@]}"
    rounded=()
    for layout in stock deci; do
        flags=(--recipe "$recipe" --sparsity "${SPARSITIES%% *}" --seed 0 --layout "$layout")
        made "${flags[@]}"
        rounded+=("$checkpoint")
    done
    timed q8_0 "${rounded[@]}"
fi
report layouts
