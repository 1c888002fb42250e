#!/usr/bin/env bash
# What only a GPU shows: seconds of every stage of pruning, measured against expected device memory with hidden states on
#   either side, what LLaMA-30B is expected to take, prefill and decoding of dense and pruned; last the tests marked gpu,
#   so that what is stopped then has its records. The model has the shape of LLaMA-7B and random weights; no network and
#   no data are needed. For pytest: arguments.
# Command: bash scripts/gpu_check.sh; variables of scripts/common.sh but MODEL and SAVE_DIR, and SHAPE (7b), SCALE (1,
#   divides its widths), LAYERS (its own), TOKENS of a sample (128), DRY_SHAPE (30b), NEW_TOKENS (32), REPEATS (3), WORK
#   (gpu_check, receives the models), MINUTES (10).
# Expected: each measured peak of device memory within a fifth of the expected one (7B: 2.2 GB with hidden states on the
#   device, 1.9 GB with them on the host; 30B: 5.0 GB). Not run on a GPU yet, so the times below are estimates.
# Memory and time: 25 GB of the device, in the speeds alone, 32 GB of host memory and 36 GB of disk; on an H100 with 16
#   cores 10 s for the dry run, 40 s to write the model, 200 s to prune it with the dense passes that it is compared
#   with, 150 s to prune it with hidden states on the host, 60 s for the speeds, 90 s for the tests. LAYERS=8 takes a
#   quarter of most of them. What does not end within MINUTES is stopped, with exit status 124.
RESULTS=${RESULTS:-results/gpu}
DEVICE=${DEVICE:-cuda}
DTYPE=${DTYPE:-bfloat16}
NUM_SAMPLES=${NUM_SAMPLES:-256}
source "$(dirname "$0")/common.sh"
SHAPE=${SHAPE:-7b}
SCALE=${SCALE:-1}
LAYERS=${LAYERS:-}
WORK=${WORK:-gpu_check}
END=$((60 * ${MINUTES:-10}))
MODEL=$WORK/$SHAPE-$SCALE-${LAYERS:-all}
export HF_HUB_OFFLINE=1
mkdir -p "$RESULTS"
rm -rf "$WORK/pruned"  # what was stopped, and had other sizes
: > "$RESULTS/seconds.txt"

# step NAME COMMAND...: run it within the time that is left; keep what it prints, and how long it took.
step() {
    local name=$1 begun=$SECONDS; shift
    [ "$begun" -lt "$END" ] || { echo "no time is left for $name" >&2; exit 124; }
    echo "== $name"
    timeout "$((END - begun))" "$@" | tee "$RESULTS/$name.txt"
    echo "$name $((SECONDS - begun))" >> "$RESULTS/seconds.txt"
}

machine="--dtype $DTYPE --device $DEVICE --batch_size $BATCH_SIZE --mlp_num ${MLP_NUM:-6}"
random="--num_samples $NUM_SAMPLES --seqlen ${TOKENS:-128} --scale $SCALE --work_dir $WORK"
# shellcheck disable=SC2086  # these are several words
{
    step dry_run $PYTHON benchmarks/pruning_speed.py --shape "${DRY_SHAPE:-30b}" $random $machine --cache_dev cpu --dry_run
    step cache_on_device $PYTHON benchmarks/pruning_speed.py --shape "$SHAPE" ${LAYERS:+--layers $LAYERS} $random $machine \
        --cache_dev "$DEVICE" --output_path "$RESULTS/cache_on_device.json"
    step cache_on_host $PYTHON model_pruning.py --base_model "$MODEL" --datasets "$WORK/ids.safetensors" $machine \
        --cache_dev cpu --save_dir "$WORK/pruned" --overwrite
    cp "$WORK"/pruned/*/olica_run.json "$RESULTS/cache_on_host.json"
    step generation_speed $PYTHON benchmarks/generation_speed.py --dense "$MODEL" --checkpoints "$WORK"/pruned/*/ \
        --device "$DEVICE" --new_tokens "${NEW_TOKENS:-32}" --repeats "${REPEATS:-3}" \
        --output_path "$RESULTS/generation_speed.json"
    step tests $PYTHON -m pytest -m gpu -rs "$@"
}
if [ "${KEEP:-no}" = no ]; then
    rm -rf "$MODEL" "$WORK/pruned" "$WORK/ids.safetensors" "$WORK/data" "$WORK/${DRY_SHAPE:-30b}-$SCALE-all"
    rmdir --ignore-fail-on-non-empty "$WORK"
fi
cat "$RESULTS/seconds.txt"
