#!/usr/bin/env bash
# Pruners of other people, as they ship, beside ours: every package in an environment of its own, all on the same model,
# tokens and number of parameters; one evaluator measures them all, and what has another size is refused.
# Command: OLICA_PEERS=peer_environments MODEL=smollm2 DATASETS=data/ids.safetensors bash benchmarks/peers.sh; variables in
#   scripts/common.sh, DATASETS being one token file (docs/models-and-texts.md), and
#   OLICA_PEERS  folder of the environments and logs (no default)
#   TORCH        version of torch in them (2.13.0)
#   PEERS        which (those of benchmarks/peers/prune.py)
#   OURS         recipes of ours to measure too (olica olica-grouped olica-plus; or none)
#   TEXTS        what two more calibration sets of ours are drawn from, by the seeds 1 and 2 (none: there are no more)
#   SPARSITIES   shares of what SPARSITY_OF says (0.2 0.33)
#   PPL          corpora (wikitext2,c4), and LONG_PPL those with windows of LONG_SEQLEN tokens too (wikitext2, 2048)
#   TASKS        (arc_easy,piqa,hellaswag), of each LIMIT rows (500)
# What is recorded is not run again; what failed is recorded with its error, and tried again.
# Memory and time: 4.5 GB of disk and 10 minutes for the environments; SmolLM2 on 2 cores: 2.1 GB and a minute or two each
#   pruning, OSSCAR 5 to 10; with all windows of three corpora some 40 minutes each evaluation, a quarter of that with
#   WINDOWS=256 LIMIT=200.
TASKS=${TASKS:-arc_easy,piqa,hellaswag}
LIMIT=${LIMIT:-500}
KEEP=${KEEP:-no}
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/../scripts/common.sh"
PEERS=${PEERS:-optipfair-static optipfair-data torch-pruning-magnitude torch-pruning-activation modelopt-independent
    modelopt-iterative fmchisel-osscar}
OURS=${OURS-olica olica-grouped olica-plus}
: "${OLICA_PEERS:?name the folder of the environments in OLICA_PEERS}"
case $DATASETS in *.safetensors) ;; *) echo "DATASETS=$DATASETS must be one token file" >&2; exit 2 ;; esac
use "${MODEL:-smollm2}"
mkdir -p "$OLICA_PEERS"
OLICA_PEERS=$(cd "$OLICA_PEERS" && pwd)
windows=${WINDOWS:+--ppl_windows $WINDOWS}
measures="--ppl ${PPL:-wikitext2,c4} $windows --tasks $TASKS --limit $LIMIT"
long="--ppl ${LONG_PPL:-wikitext2} --ppl_seqlen ${LONG_SEQLEN:-2048} $windows"
long_batch=1  # window at a time, whose logits take 0.4 GB

# packages PEER: what pip installs for it; behind a + what it installs without what that asks for. torch is pinned
# everywhere, since an open range takes a build with CUDA.
packages() {
    local torch=torch==${TORCH:-2.13.0}
    local tested="$torch transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0"
    case $1 in
        optipfair-*) echo "$tested optipfair==0.4.2" ;;
        torch-pruning-*) echo "$tested torch-pruning==1.6.1" ;;
        modelopt-*) echo "$tested nvidia-modelopt==0.47.0 requests==2.34.2" ;;  # it imports requests, and does not say so
        fmchisel-*)
            # Asks for torch before 2.8, of which there is no CPU build at the registry; it runs with a later one.
            echo "$torch transformers==4.52.4 numpy==1.26.4 safetensors==0.8.0 datasets==4.0.0 pyarrow==20.0.0" \
                "accelerate==1.7.0 dataclasses_json==0.6.7 loguru==0.7.3 pynvml==13.0.1 pillow==13.0.0 pydantic==2.14.4" \
                "requests==2.34.2 + fmchisel==0.1.2 llmcompressor==0.5.1 compressed-tensors==0.9.4"
            ;;
    esac
}

# install PEER FOLDER: its environment, unless that is there.
install() {
    local wanted; wanted=$(packages "$1")
    [ -n "$wanted" ] || { echo "error: PEERS names $1, which is unknown" >&2; return 1; }
    [ ! -f "$2/installed" ] || [ "$(<"$2/installed")" != "$wanted" ] || return 0
    local pip="$2/bin/python -m pip --disable-pip-version-check install --quiet --no-compile"
    # shellcheck disable=SC2086  # several words
    "$PYTHON" -m venv --clear "$2" && $pip ${wanted%%+*} || return
    if [ "$wanted" != "${wanted%%+*}" ]; then
        # shellcheck disable=SC2086
        $pip --no-deps ${wanted##*+} || return
    fi
    echo "$wanted" > "$2/installed"
}

# measured FOLDER SPARSITY OUT MEASURES: what check_size.py lets through.
measured() {
    $PYTHON benchmarks/peers/check_size.py --checkpoint "$1" --base_model "$MODEL" --sparsity "$2" \
        --sparsity_of "$SPARSITY_OF" && evaluate "$1" "$3" "$4"
}

# step NAME COMMAND...: run it for the peer at hand; where it fails, record that and give it up.
step() {
    local name=$1 log=$OLICA_PEERS/$peer.log; shift
    ! "$@" > "$log" 2>&1 || return 0
    $PYTHON benchmarks/peers/failure.py --peer "$peer" --sparsity "$sparsity" --packages "$(packages "$peer")" \
        --step "$name" --log "$log" --hide "$OLICA_PEERS" "$PWD" --output_path "$out/failure.json"
    return 1
}

# shipped: prune by the peer at hand, and measure.
shipped() {
    local name=${peer}_sparsity-$sparsity
    local out=$RECORDS/peers_as_shipped/$name out_long=$RECORDS/peers_as_shipped/long/$name
    local folder=$SAVE_DIR/${RECORDS##*/}-peers/$name environment=$OLICA_PEERS/${peer%-*}
    local pruning="--base_model $MODEL --tokens $DATASETS --sparsity $sparsity --sparsity_of $SPARSITY_OF"
    local flags; flags="$peer of $(packages "$peer"): $pruning --dtype $DTYPE"
    if recorded "$flags $measures" "$out/flags" "$out/evaluation.json" "$out/pruning.json" &&
        recorded "$flags $long" "$out_long/flags" "$out_long/evaluation.json" "$out_long/pruning.json"; then
        return
    fi
    rm -f "$out/flags" "$out_long/flags"
    if ! recorded "$flags" "$folder/flags"; then
        step install install "$peer" "$environment" || return 0
        rm -rf "$folder"
        step prune env HF_HUB_OFFLINE=1 "$environment/bin/python" benchmarks/peers/prune.py "$peer" --dense "$dense" \
            --tokens "$DATASETS" --sparsity "$sparsity" --sparsity_of "$SPARSITY_OF" --batch_size "$BATCH_SIZE" \
            --output_path "$folder" || return 0
        echo "$flags" > "$folder/flags"
    fi
    step evaluate measured "$folder" "$sparsity" "$out" "$measures" || return 0
    EVALUATION_BATCH_SIZE=$long_batch step evaluate measured "$folder" "$sparsity" "$out_long" "$long" || return 0
    cp "$folder/peer_run.json" "$out/pruning.json"
    cp "$folder/peer_run.json" "$out_long/pruning.json"
    echo "$flags $measures" > "$out/flags"
    echo "$flags $long" > "$out_long/flags"
    rm -f "$out/failure.json"
    [ "$KEEP" = yes ] || rm -r "$folder"
    echo "$name is measured"
}

dense peers_as_shipped/dense "$measures"
EVALUATION_BATCH_SIZE=$long_batch dense peers_as_shipped/long/dense "$long"
dense=$SAVE_DIR/${RECORDS##*/}-peers/dense
if ! recorded "--base_model $MODEL" "$dense/flags"; then
    rm -rf "$dense"
    $PYTHON benchmarks/peers/dense.py --base_model "$MODEL" --output_path "$dense"
    echo "--base_model $MODEL" > "$dense/flags"
fi
for sparsity in ${SPARSITIES:-0.2 0.33}; do
    for peer in $PEERS; do shipped; done
    for recipe in $OURS; do
        for seed in 0 ${TEXTS:+1 2}; do
            name=${recipe}_sparsity-${sparsity}_seed-$seed
            # shellcheck disable=SC2207  # two words, or none
            flags=(--recipe "$recipe" --sparsity "$sparsity" --seed "$seed" $(corrections "$recipe" "$sparsity"))
            if [ "$seed" = 0 ]; then
                pruned "peers_as_shipped/$name" "$measures" "${flags[@]}"
                EVALUATION_BATCH_SIZE=$long_batch pruned "peers_as_shipped/long/$name" "$long" "${flags[@]}"
            else
                DATASETS=$TEXTS pruned "peers_as_shipped/$name" "$measures" "${flags[@]}"
            fi
        done
    done
done
report peers
