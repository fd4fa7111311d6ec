#!/usr/bin/env bash
# Takes servecast and vLLM to a GPU machine without network, measures there, and packs what there is to take back.
# At home:
#   pack FOLDER [PART_MIB]   servecast's wheel, and vLLM with its needs in parts of that size (59). Parts that
#                            are in FOLDER are kept. The first time takes 10 minutes and 3 GB of scratch.
# On the GPU machine, in this repository (all that is kept there lies below $OFFLINE_HOME):
#   add FOLDER               keep what FOLDER holds; as often as it takes until all parts are there
#   install                  put the parts together, and say what can be imported
#   run SECONDS FOLDER       run the campaign $PLAN (h200; a plan's file, or its name here), and after each stage
#                            pack all there is into FOLDER. Once more: goes on with what is not done.
# PYTHON (python3) is the machine's that has torch. When packing, LIST is a list of wheels instead of wheels.txt,
# FOR_PYTHON the machine's version (3.12), and LEAVE_OUT names files that are not carried.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
home=$(realpath -sm "${OFFLINE_HOME:-$HOME/servecast-offline}")
site=$home/site parts=$home/parts scratch=""
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

# FlashAttention 2 (a GPU older than Hopper needs it), the Rust front end, builds for other Pythons
LEAVE_OUT=${LEAVE_OUT-vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/vllm-rs
    vllm/third_party/deep_gemm/_C.cpython-31[0134]-*.so}

pack() {
    local folder=${1:?folder for the parts} part=${2:-59}
    mkdir -p "$folder"
    folder=$(realpath "$folder") scratch=$(mktemp -d)
    rm -f "$folder"/servecast-*.whl
    mkdir "$scratch/source"
    git -C "$here" ls-files -z --full-name ../.. |
        tar -C "$here/../.." --null -T - --ignore-failed-read -c | tar -C "$scratch/source" -x
    "$python" -m pip wheel -q --no-deps -w "$folder" "$scratch/source"
    if [ ! -e "$folder/site.tar.xz.00" ]; then
        pack_site
        tar -C "$scratch/site" -c . | xz -T0 -6 | split -b "${part}M" -d - "$folder/site.tar.xz."
    fi
    (cd "$folder" && sha256sum servecast-*.whl site.tar.xz.* >SHA256SUMS && ls -l)
}

pack_site() { # -> $scratch/site
    local glibc wheel data lib platforms=()
    for glibc in _2_{5,12,17,24,26,27,28,31,34,35,39} 1 2010 2014; do
        platforms+=(--platform "manylinux${glibc}_x86_64")
    done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${FOR_PYTHON:-3.12}" \
        --implementation cp "${platforms[@]}" -d "$scratch/wheels" -r "${LIST:-$here/wheels.txt}"
    mkdir "$scratch/site"
    for wheel in "$scratch"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$scratch/site"; done
    cd "$scratch/site"
    for data in *.data; do
        [ -d "$data" ] || continue
        for lib in purelib platlib; do [ ! -d "$data/$lib" ] || cp -r "$data/$lib/." .; done
        rm -rf "$data"
    done
    # shellcheck disable=SC2086  # patterns
    rm -rf $LEAVE_OUT
    find . -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
    # On CUDA vLLM 0.23 imports the package humming as soon as any quantization is asked for, fp8 too, which does
    # not use it. humming would compile itself there; a class that is never chosen takes its place.
    local file=vllm/model_executor/layers/quantization/__init__.py
    local import='import HummingConfig' instead='from .base_config import QuantizationConfig as HummingConfig'
    [ ! -e "$file" ] || [ -d humming ] || sed -i "s/^\( *\)from \.humming $import\$/\1$instead/" "$file"
    cd "$here"
}

add() {
    mkdir -p "$parts"
    cp "${1:?folder with parts}"/* "$parts"/
    ls -l "$parts"
}

install() {
    (cd "$parts" && sha256sum -c --quiet SHA256SUMS)
    rm -rf "$site"
    mkdir -p "$site"
    cat "$parts"/site.tar.xz.* | xz -dc -T0 | tar -x -C "$site"
    "$python" -m zipfile -e "$parts"/servecast-*.whl "$site"
    "$python" -m compileall -q -j 0 "$site" >/dev/null 2>&1 || true # files for other Pythons do not compile
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no nvidia-smi"
    local name
    for name in servecast.__main__ torch vllm matplotlib vllm.model_executor.layers.quantization; do
        PYTHONPATH=$site "$python" -c "import $name" || echo "$name CANNOT BE IMPORTED"
    done
}

run() {
    local seconds=${1:?seconds that it may take} folder=${2:?folder for the results} plan=${PLAN:-h200}
    [ -f "$plan" ] || plan=$here/$plan.yaml
    # a server and its benchmark hold a file for each request
    ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    exec "$python" "$here/campaign.py" "$plan" "$home/campaign" "$seconds" --pack "$folder"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    pack | add | install | run) "$command" "$@" ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
esac
