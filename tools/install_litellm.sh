#!/usr/bin/env bash
# Installs the LiteLLM proxy that a live test puts before vLLM, in an environment of its own.
# Usage: tools/install_litellm.sh [FOLDER]   (default: .venv-litellm beside this folder; about two minutes, once)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-litellm}
python=$folder/bin/python
stamp=$folder/installed-$(cksum <tools/install_litellm.sh | cut -d' ' -f1)
say() { echo "LiteLLM for a live test: $*"; }
if [ -e "$stamp" ]; then
    say "present in $folder"
    exit 0
fi

say "a new environment in $folder"
"${PYTHON:-python3}" -m venv "$folder"
say "installing litellm 1.104.3 with its proxy"
"$python" -m pip install -qq --disable-pip-version-check 'litellm[proxy]==1.104.3'
"$python" -c 'from importlib.metadata import version; print("  litellm", version("litellm"))'
touch "$stamp"
say "ready in $folder"
