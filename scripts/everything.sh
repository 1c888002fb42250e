#!/usr/bin/env bash
# Everything that README.md, RESULTS.md and docs/ show: records, tables, figures, from this repository, a folder of
#   texts and the two models that scripts/fetch_models.sh fetches.
# Command: bash scripts/everything.sh, or some stages of it: bash scripts/everything.sh paper methods
# Variables: SHARED, the folder of the texts (docs/reproduce.md lists them); REFERENCE (SHARED/../reference), that of the
#   released code's samples and figures; MODELS (models), the fetched ones; OLICA_LLAMA_CPP and OLICA_PEERS, folders of
#   environments, without which what wants them is left out; and DEVICE, BATCH_SIZE, RESULTS, SAVE_DIR, PYTHON of
#   scripts/common.sh.
# What is recorded is not run again, and what was stopped goes on; each stage says how long it took. On two cores all
# of it takes about two nights: most for methods (7 hours), tasks (6) and peers (4). Speed wants the machine for itself.
# Grids are smaller than the paper's: 512 windows and 32 samples of each text in the figures, 200 rows in its tables.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SHARED:?name the folder of the texts in SHARED}"
STAGES="texts paper methods qwen gemma web tasks refits decoding layouts mixes vocabularies comparison peers choices"
STAGES+=" speed shapes page"
REFERENCE=${REFERENCE:-$SHARED/../reference}
MODELS=${MODELS:-models}
RESULTS=${RESULTS:-results}
PYTHON=${PYTHON:-.venv/bin/python}
export RESULTS PYTHON DATA_DIR=data
QWEN=$MODELS/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
GEMMA=$MODELS/gemma-3-270m-q4_k_m.gguf
TWO=data/novels_calibrate.jsonl+data/alpaca_6k.jsonl.gz
WEB=data/openwebtext_1000.jsonl.gz
CORPORA=wikitext2,data/c4_report.jsonl,ptb,data/novels_report.jsonl
TWO_CORPORA=wikitext2,data/c4_report.jsonl  # what hours are short for more than
CHOSEN_ON=data/wikitext2_raw_validation.jsonl,data/c4_calibrate.jsonl  # texts that no table reports
ALL="magnitude wanda-sp flap lorap modegpt slimgpt osscar let-llm-tell slimllm"
OURS="olica olica-grouped olica-plus"

# once RECORD COMMAND...: have a command write a record, unless it is there; what is stopped or fails leaves none.
once() {
    local record=$RESULTS/$1; shift
    [ ! -f "$record" ] || { echo "$record is there"; return; }
    "$PYTHON" "$@" --output_path "$record.partial"
    mv "$record.partial" "$record"
}

# of_smollm2, of_qwen, of_gemma NAME=VALUE... COMMAND...: with the variables of a model's tables.
of_smollm2() { env MODEL=smollm2 DATASETS=data/smollm2_ids.safetensors PPL="$CORPORA" "$@"; }
of_qwen() {
    env MODEL="$QWEN" LABEL=qwen2.5-coder-0.5b DATASETS="$TWO" NUM_SAMPLES=48 SPARSITY_OF=layers PPL="$CORPORA" \
        WINDOWS=48 DTYPE=float32 "$@"
}
of_gemma() {
    env MODEL="$GEMMA" LABEL=gemma-3-270m DATASETS="$TWO" NUM_SAMPLES=48 SPARSITY_OF=layers PPL="$CORPORA" \
        WINDOWS=48 DTYPE=bfloat16 PRUNING_DTYPE=bfloat16 START_TOKEN=yes "$@"
}

# copied PATH: a copy in data/, whole or none.
copied() {
    rm -rf data/copied
    cp -r "$1" data/copied
    mv data/copied "data/${1##*/}"
}

texts() {
    mkdir -p data
    for name in wikitext2_raw_test.jsonl wikitext2_raw_validation.jsonl ptb_test.txt alpaca_6k.jsonl.gz \
        openwebtext_1000.jsonl.gz eval; do
        [ -e "data/$name" ] || copied "$SHARED/$name"
    done
    [ -e data/smollm2_ids.safetensors ] || copied "$REFERENCE/smollm2_ids.safetensors"
    "$PYTHON" scripts/split_texts.py --data_dir "$SHARED" --output_dir data
}

paper() {
    local of_tables="MODEL=smollm2 DATASETS=$TWO LIMIT=200 DTYPE=bfloat16" number
    local of_figures="MODEL=smollm2 DATASETS=$TWO WINDOWS=512 NUM_SAMPLES=32 DTYPE=bfloat16"
    # shellcheck disable=SC2086  # several variables each
    {
        for number in 1 2 3 4 5 6; do env $of_tables bash scripts/table$number.sh; done
        MODEL=smollm2 bash scripts/figure2.sh
        env $of_figures bash scripts/figure3.sh
        env $of_figures bash scripts/figure4.sh
        env $of_figures TEXT=$WEB SAMPLES="8 32 64 128 256" LENGTHS="32 64 128 256 512" LENGTH_SAMPLES=64 \
            bash scripts/figure5.sh
        env $of_figures MIXES="$TWO $WEB+data/alpaca_6k.jsonl.gz" bash scripts/figure6.sh
    }
    once smollm2/reference.json scripts/reference_figures.py --reference_dir "$REFERENCE"
}

methods() {
    of_smollm2 RECIPES="$OURS" bash scripts/methods.sh
    of_smollm2 RECIPES="$ALL" SPARSITIES="0.2 0.33" bash scripts/methods.sh
    of_smollm2 RECIPES="$OURS" SPARSITIES="0.2 0.33" SEEDS="1 2" DATASETS=$TWO PPL=$TWO_CORPORA bash scripts/methods.sh
}

qwen() {
    of_qwen SPARSITIES="0.1 0.2 0.33 0.5" bash scripts/methods.sh
    of_qwen RECIPES="slimgpt flap slimllm" SPARSITIES="0.1 0.2 0.33" bash scripts/methods.sh
    of_qwen SPARSITIES=0.2 SPARSITY_OF=model MIX=of_model bash scripts/methods.sh
    of_qwen SCORED=yes LIMIT=200 SPARSITIES="0.2 0.33" bash scripts/methods.sh
}

gemma() {
    of_gemma SPARSITIES="0.1 0.2 0.33" bash scripts/methods.sh
    of_gemma RECIPES="slimgpt flap" SPARSITIES="0.1 0.2 0.33" bash scripts/methods.sh
    of_gemma SPARSITIES=0.2 SPARSITY_OF=model MIX=of_model bash scripts/methods.sh
    of_gemma SCORED=yes LIMIT=200 SPARSITIES="0.2 0.33" bash scripts/methods.sh
}

web() {
    of_smollm2 DATASETS=$WEB NUM_SAMPLES=768 MIX=web SPARSITIES="0.2 0.33" PPL=$TWO_CORPORA bash scripts/methods.sh
}

tasks() {
    of_smollm2 SCORED=yes LIMIT=500 bash scripts/methods.sh
    of_smollm2 RECIPES="$ALL" SCORED=yes LIMIT=500 SPARSITIES="0.2 0.33" bash scripts/methods.sh
}

refits() {
    of_smollm2 RECIPES="olica-grouped $ALL" REFITS="recipe none least-squares" SPARSITIES=0.2 PPL=$TWO_CORPORA \
        WINDOWS=256 DTYPE=bfloat16 PRUNING_DTYPE=bfloat16 MIX=dial OWN_DENSE=yes bash scripts/methods.sh
}

decoding() { of_smollm2 RECIPES="$OURS $ALL" TIMED=yes SPARSITIES=0.2 bash scripts/methods.sh; }

layouts() { of_smollm2 PPL=$TWO_CORPORA WINDOWS=256 DTYPE=float32 bash scripts/layouts.sh; }

mixes() {
    MODEL=smollm2 WINDOWS=256 bash scripts/texts.sh
    MODEL=$QWEN LABEL=qwen2.5-coder-0.5b NUM_SAMPLES=96 SPARSITY_OF=layers WINDOWS=48 DTYPE=float32 \
        bash scripts/texts.sh
}

vocabularies() {
    of_smollm2 DATASETS=$TWO COUNTED=$TWO+$WEB PPL=$TWO_CORPORA WINDOWS=256 DTYPE=bfloat16 bash scripts/vocabulary.sh
    of_qwen COUNTED=$TWO+$WEB SIZES=80000 SPARSITY_OF=model PPL=$TWO_CORPORA WINDOWS=128 DTYPE=bfloat16 \
        bash scripts/vocabulary.sh
}

comparison() {
    of_smollm2 SPARSITY_OF=layers PPL=$TWO_CORPORA WINDOWS=256 bash scripts/compare.sh
    of_qwen PPL=$TWO_CORPORA bash scripts/compare.sh
    of_gemma PPL=$TWO_CORPORA CHAT=no bash scripts/compare.sh
}

peers() {
    [ -n "${OLICA_PEERS:-}" ] || { echo "OLICA_PEERS is not set: no packages of other people"; return; }
    of_smollm2 PPL=$TWO_CORPORA WINDOWS=256 LIMIT=200 TEXTS=$TWO bash benchmarks/peers.sh
}

choices() {
    local folder=choices/olica_plus
    once $folder/ablation_smollm2.json benchmarks/ablation.py --datasets data/smollm2_ids.safetensors \
        --ppl $CHOSEN_ON --ppl_windows 128 --dtype float32
    once $folder/ablation_qwen2.5-coder-0.5b.json benchmarks/ablation.py --base_model "$QWEN" --datasets $TWO \
        --num_samples 32 --ppl $CHOSEN_ON --ppl_windows 32 --dtype float32
    once $folder/refit_texts_smollm2.json benchmarks/refit_texts.py \
        --texts data/novels_calibrate.jsonl,data/alpaca_6k.jsonl.gz,$WEB,pysource
}

speed() {
    local recipe layers
    if [ ! -d smollm2_plain ]; then
        PYTHONPATH=scripts "$PYTHON" -c 'import os, reference_figures as ours
ours.make_plain(ours.read_model(ours.locate("smollm2"), "float32")).save_pretrained("smollm2_plain.partial")
os.rename("smollm2_plain.partial", "smollm2_plain")'
    fi
    for recipe in olica olica-plus; do
        once smollm2/pruning_speed${recipe#olica}.json benchmarks/pruning_speed.py --base_model smollm2_plain \
            --datasets data/smollm2_ids.safetensors --recipe $recipe
    done
    for layers in 8 16 32; do
        once streaming/layers_$layers.json benchmarks/pruning_speed.py --shape 7b --scale 4 --layers $layers \
            --num_samples 32
    done
    for layers in 24 83; do
        once streaming/gguf_layers_$layers.json benchmarks/reading_memory.py --base_model "$QWEN" --recipe magnitude \
            --layers $layers
    done
    if ! is_timed smollm2; then generation smollm2 smollm2 $TWO; fi
    is_timed width_2048 && return
    # A wide model with random weights: 4 layers of half the width of LLaMA-7B; its tokens are written when it is whole.
    [ -f pruning_speed/wide/ids.safetensors ] || "$PYTHON" benchmarks/pruning_speed.py --shape 7b --scale 2 --layers 4 \
        --work_dir pruning_speed/wide
    generation pruning_speed/wide/7b-2-4 width_2048 pruning_speed/wide/ids.safetensors
}

# is_timed LABEL: whether both records of `generation` are there.
is_timed() {
    [ -f "$RESULTS/$1/generation_speed_float32.json" ] && [ -f "$RESULTS/$1/generation_speed_bfloat16.json" ]
}

# generation MODEL LABEL DATASETS: prefill and decoding of a model pruned by `olica` to three sizes, one also rounded.
generation() {
    local dtype sparsity round checkpoints=()
    local work=${SAVE_DIR:-./pruned_models}/generation
    while read -r sparsity round; do
        checkpoints+=("$work/round_to-$round/${1##*/}_sparsity-$sparsity")
        [ -d "${checkpoints[-1]}" ] || "$PYTHON" model_pruning.py --base_model "$1" --datasets "$3" --data_dir data \
            --sparsity "$sparsity" --round_to "$round" --save_dir "$work/round_to-$round" --mlp_num 2 --overwrite
    done <<< $'0.2 1\n0.33 1\n0.5 1\n0.2 8\n0.2 32'
    for dtype in float32 bfloat16; do
        once "$2/generation_speed_$dtype.json" benchmarks/generation_speed.py --dense "$1" \
            --checkpoints "${checkpoints[@]}" --dtype $dtype
    done
}

shapes() {
    local shape sparsity
    while read -r shape sparsity; do
        once shapes/$shape.json benchmarks/pruning_speed.py --shape $shape --layers 2 --mlp_num 1 --num_samples 32 \
            --sparsity $sparsity
    done <<< $'7b 0.126\nqwen3-8b 0.056\nllama3-8b 0.067'
}

page() {
    "$PYTHON" scripts/report.py --results "$RESULTS"
    "$PYTHON" scripts/write_sizing.py  # by the records in results/
}

for stage in ${*:-$STAGES}; do
    case " $STAGES " in *" $stage "*) ;; *) echo "$stage is no stage; give some of: $STAGES" >&2; exit 2 ;; esac
    begun=$SECONDS
    echo "== $stage"
    $stage
    echo "== $stage took $(((SECONDS - begun + 30) / 60)) minutes"
done
