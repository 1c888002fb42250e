#!/usr/bin/env bash
# Loads pruned checkpoints on releases of transformers from 4.46 to the newest, with the code in their folders alone,
# and compares with what this package computes; on releases that the package runs on, with the package too.
# Every release lies in a folder of its own, with what it wants beside it; one PyTorch serves all. Tiny models of every
# family in every layout; 3 GB and a quarter of an hour, nearly all of it for installing.
# Expected: every check holds wherever the release has the family.
# Variables: PYTHON (.venv/bin/python), the environment of this package; COMPATIBILITY (compatibility), the folder of the
#   others; RELEASES and WITH_OLICA, which are tried; CHECKPOINTS, folders of further pruned checkpoints; RECORD.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=${COMPATIBILITY:-compatibility}
RELEASES=${RELEASES:-4.46.3 4.51.3 4.53.3 4.57.6 5.24.0}
WITH_OLICA=${WITH_OLICA:-5.23.0 5.24.0}
RECORD=${RECORD:-results/compatibility/releases.json}

pip() { "$PYTHON" -m pip --disable-pip-version-check install --quiet "$@"; }
mkdir -p "$FOLDER"
if [ ! -e "$FOLDER/torch/complete" ]; then
    "$PYTHON" -m venv --clear "$FOLDER/torch"
    pip --python "$FOLDER/torch/bin/python" -c constraints.txt torch
    touch "$FOLDER/torch/complete"
fi
for release in $RELEASES $WITH_OLICA; do
    if [ ! -e "$FOLDER/$release/complete" ]; then
        rm -rf "${FOLDER:?}/$release"
        pip --target "$FOLDER/$release" "transformers==$release" jinja2
        touch "$FOLDER/$release/complete"
    fi
done
# shellcheck disable=SC2086  # lists of words
"$PYTHON" scripts/compatibility.py "$FOLDER" --releases $RELEASES --with_olica $WITH_OLICA \
    --checkpoints ${CHECKPOINTS:-} --output_path "$RECORD"
