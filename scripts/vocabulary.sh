#!/usr/bin/env bash
# Fewer tokens beside smaller layers: a model is brought to one size by pruning its layers alone, and by taking tokens from
# its vocabulary first. Quality is in bits per byte, since perplexities by different tokens say nothing of each other.
# Command: bash scripts/vocabulary.sh, or MODEL=smollm2 bash scripts/vocabulary.sh; variables in scripts/common.sh, and
#   SIZES       tokens to keep, each in turn (44000 36000)
#   COUNTED     texts, joined by +, whose rarest tokens go (DATASETS)
#   SPARSITIES  of the whole model as it is (0.2 0.33)
#   RECIPE      which (olica-plus)
#   PPL         corpora (wikitext2,c4)
# SPARSITY_OF is the model, and DATASETS are texts: a token file is of one vocabulary.
# Memory and time: SmolLM2 on 2 cores: 1.6 GB; each size as long as a survey, and as pruning and measuring at each sparsity.
source "$(dirname "$0")/common.sh"
use "${MODEL:-7b}"
whole=$MODEL
measures="--ppl ${PPL:-wikitext2,c4} ${WINDOWS:+--ppl_windows $WINDOWS}"

# of_whole SPARSITY: which share of what MODEL has goes when SPARSITY of the whole model is to be gone with its tokens.
of_whole() {
    sed -n '/"parameters"/,/}/p' "$MODEL/olica_vocabulary.json" | tr -d ',' | awk -v sparsity="$1" '
        # The first of each: what may follow is of an earlier loss.
        /"before"/ && !before { before = $2 }
        /"after"/ && !after { after = $2 }
        END { printf "%.6f\n", 1 - (1 - sparsity) * before / after }'
}

counted=${COUNTED:-$DATASETS}
of=$(printf '%s' "$whole $counted" | cksum | cut -d ' ' -f 1)  # for the name of a folder
for size in all ${SIZES:-44000 36000}; do
    MODEL=$whole
    if [ "$size" != all ]; then
        MODEL=$SAVE_DIR/${RECORDS##*/}_vocabulary-$size-$of
        [ -d "$MODEL" ] || $PYTHON model_export.py "$whole" --vocab_size "$size" --datasets "$counted" \
            --data_dir "$DATA_DIR" --output_path "$MODEL"
    fi
    mkdir -p "$RECORDS/vocabulary/$size"
    [ "$size" = all ] || cp "$MODEL/olica_vocabulary.json" "$RECORDS/vocabulary/$size/"
    dense "vocabulary/$size/dense" "$measures"
    for sparsity in ${SPARSITIES:-0.2 0.33}; do
        share=$sparsity
        [ "$size" = all ] || share=$(of_whole "$sparsity")
        case $share in -*) echo "with $size tokens it is smaller than that already"; continue ;; esac
        pruned "vocabulary/$size/sparsity-$sparsity" "$measures" --recipe "${RECIPE:-olica-plus}" --sparsity "$share" \
            --seed 0
    done
done
report vocabulary
