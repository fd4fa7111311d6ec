#!/usr/bin/env bash
# Takes servecast and vLLM to a GPU machine without network, and a campaign's results back from it.
# At home:
#   pack FOLDER [PART_MIB]   servecast's wheel, and vLLM with its needs in parts of that size (59). Parts that
#                            are in FOLDER are kept. The first time takes 10 minutes and 3 GB of scratch.
# On the GPU machine, in this repository (all that is kept there lies below $OFFLINE_HOME):
#   add FOLDER               keep what FOLDER holds; as often as it takes until all parts are there
#   install                  put the parts together, and say what can be imported
#   start SECONDS [FLAG...]  start the campaign $PLAN (h200), which goes on when this command has ended. Flags
#                            are those of servecast validate campaign: --resume, --only NAME, ...
#   wait SECONDS FOLDER      wait until it ends, so long at most, then pack what is there into FOLDER, which
#                            takes up to 40 s more; says ALIVE or ENDED under the end of the log
# PYTHON (python3) is the machine's that has torch. When packing, LIST is a list of wheels instead of
# offline_gpu.txt, FOR_PYTHON the machine's version (3.12), and LEAVE_OUT names files that are not carried.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
whole() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
python=$(whole "$(command -v "${PYTHON:-python3}")")
home=$(whole "${OFFLINE_HOME:-$HOME/servecast-offline}")
plan=${PLAN:-h200}
[ ! -f "$plan" ] || plan=$(whole "$plan")
site=$home/site parts=$home/parts out=$home/campaign
scratch=""
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

# FlashAttention 2 (a GPU older than Hopper needs it), the Rust front end, builds for other Pythons
LEAVE_OUT=${LEAVE_OUT-vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/vllm-rs
    vllm/third_party/deep_gemm/_C.cpython-31[0134]-*.so}

pack() {
    local folder=${1:?folder for the parts} part=${2:-59}
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    scratch=$(mktemp -d)
    rm -f "$folder"/servecast-*.whl
    mkdir "$scratch/source"
    git -C "$here/.." ls-files -z | tar -C "$here/.." --null -T - --ignore-failed-read -c | tar -C "$scratch/source" -x
    "$python" -m pip wheel -q --no-deps -w "$folder" "$scratch/source"
    if [ ! -e "$folder/site.tar.xz.00" ]; then
        pack_site
        tar -C "$scratch/site" -c . | xz -T0 -6 | split -b "${part}M" -d - "$folder/site.tar.xz."
    fi
    (cd "$folder" && sha256sum servecast-*.whl site.tar.xz.* >SHA256SUMS && ls -l)
}

pack_site() { # -> $scratch/site
    local glibc platforms=()
    for glibc in _2_{5,12,17,24,26,27,28,31,34,35,39} 1 2010 2014; do
        platforms+=(--platform "manylinux${glibc}_x86_64")
    done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${FOR_PYTHON:-3.12}" \
        --implementation cp "${platforms[@]}" -d "$scratch/wheels" -r "${LIST:-$here/offline_gpu.txt}"
    mkdir "$scratch/site"
    local wheel data lib
    for wheel in "$scratch"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$scratch/site"; done
    (
        cd "$scratch/site"
        for data in *.data; do
            [ -d "$data" ] || continue
            for lib in purelib platlib; do [ ! -d "$data/$lib" ] || cp -r "$data/$lib/." .; done
            rm -rf "$data"
        done
        # shellcheck disable=SC2086  # patterns
        rm -rf $LEAVE_OUT
        find . -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
        without_humming
    )
}

# On CUDA vLLM 0.23 imports the package humming as soon as any quantization is asked for, fp8 too, which does
# not use it. humming would compile itself there; a class that is never chosen takes its place.
without_humming() {
    local file=vllm/model_executor/layers/quantization/__init__.py
    local import='import HummingConfig' instead='from .base_config import QuantizationConfig as HummingConfig'
    [ -e "$file" ] && [ ! -d humming ] || return 0
    sed -i "s/^\( *\)from \.humming $import\$/\1$instead/" "$file"
}

add() {
    local folder=${1:?folder with parts}
    mkdir -p "$parts"
    cp "$folder"/* "$parts"/
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
    PYTHONPATH=$site "$python" - <<'PYTHON'
import importlib
import sys
from importlib.metadata import version

print("python", sys.version.split()[0])
for name in ("servecast", "torch", "vllm", "matplotlib"):
    try:
        importlib.import_module(name if name != "servecast" else "servecast.sim.cli")
        print(name, version(name))
    except Exception as error:
        print(f"{name} CANNOT BE IMPORTED: {error!r}")
try:
    import torch
    from vllm.model_executor.layers.quantization import get_quantization_config

    print("GPU", torch.cuda.is_available() and torch.cuda.get_device_name())
    print("fp8", get_quantization_config("fp8").__name__)
except Exception as error:
    print(f"fp8 CANNOT BE USED: {error!r}")
PYTHON
}

servecast() { PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} "$python" -m servecast "$@"; }

alive() { # not gone, and not ended without anybody having looked
    [ -e "$home/pid" ] && grep -q '^State:[[:space:]]*[^ZX]' "/proc/$(cat "$home/pid")/status" 2>/dev/null
}

start() {
    local seconds=${1:?seconds that the campaign may take}
    shift
    if alive; then
        echo "process $(cat "$home/pid") runs already"
        return 1
    fi
    mkdir -p "$out/logs"
    nvidia-smi -q >"$out/logs/nvidia-smi.txt" 2>/dev/null || true
    cp "$0" "$home/started.sh" # this file may be replaced while the campaign runs
    export PYTHON=$python PLAN=$plan OFFLINE_HOME=$home
    cd "$home"
    setsid nohup bash started.sh campaign "$seconds" "$@" </dev/null >>campaign.log 2>&1 &
    echo $! >"$home/pid"
    echo "started process $(cat "$home/pid"): $plan into $out, $seconds s"
}

campaign() { # what start starts: the campaign, and the GPU's clocks each second beside it
    local seconds=$1 fields=clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,memory.used
    shift
    nvidia-smi --query-gpu="timestamp,$fields" --format=csv,noheader,nounits -l 1 \
        >>"$out/logs/clocks.csv" 2>/dev/null &
    logger=$!
    trap 'kill "$logger" 2>/dev/null || true' EXIT
    servecast validate campaign "$plan" --out "$out" --time-budget "$seconds" "$@"
}

wait_and_pack() {
    local until=$((SECONDS + ${1:?seconds to wait})) folder=${2:?folder for the results}
    while alive && [ "$SECONDS" -lt "$until" ]; do sleep 1; done
    mkdir -p "$folder"
    servecast validate campaign "$plan" --out "$out" --pack "$folder" --pack-only || true
    cp "$home/campaign.log" "$folder/"
    tail -n 40 "$home/campaign.log"
    if alive; then echo ALIVE; else echo ENDED; fi
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    pack | add | install | start | campaign) "$command" "$@" ;;
    wait) wait_and_pack "$@" ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
esac
