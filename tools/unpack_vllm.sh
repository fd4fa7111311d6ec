#!/usr/bin/env bash
# Unpacks the Python sources of vLLM releases beside the vLLM that tools/install_vllm.sh installed, under whose
# torch their schedulers run: .venv-vllm/vllm-0.27, put first on PYTHONPATH. A release takes seconds and 30 to
# 60 MB; its wheel (300 to 600 MB) is thrown away. What is there already is kept.
# Usage: tools/unpack_vllm.sh RELEASE...   for example 0.20 0.33, or 0.19.1 for a patch release
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.venv-vllm
python=$folder/bin/python
wheels=$(mktemp -d -p "$folder")
trap 'rm -rf "$wheels"' EXIT
for version in "$@"; do
    release=$(cut -d. -f1,2 <<<"$version")
    [ "$version" != "$release" ] || version=$release.0
    if [ -d "$folder/vllm-$release" ] || compgen -G "$folder/lib/python*/site-packages/vllm-$release.*.dist-info" >/dev/null; then
        continue
    fi
    echo "vLLM for the parity tests: unpacking the sources of vllm $version"
    # releases up to 0.23 import gguf
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: --dest "$wheels" \
        "vllm==$version" gguf
    "$python" - "$wheels" "$wheels/unpacked" <<'PYTHON'
import pathlib
import sys
import zipfile

for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith((".py", "/METADATA"))]
        archive.extractall(sys.argv[2], names)
PYTHON
    rm "$wheels"/*.whl
    mv "$wheels/unpacked" "$folder/vllm-$release"
done
