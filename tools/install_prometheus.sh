#!/usr/bin/env bash
# Unpacks Debian's Prometheus for a live test: no service is started, and the machine's packages stay as they are.
# Where it cannot be had (no apt-get, no network), the test that needs it is skipped.
# Usage: tools/install_prometheus.sh [FOLDER]   (default: .prometheus beside this folder; some seconds, once)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.prometheus}
say() { echo "Prometheus for a live test: $*"; }
if command -v prometheus >/dev/null; then
    say "present as $(command -v prometheus)"
    exit 0
fi
if [ -x "$folder/usr/bin/prometheus" ]; then
    say "present in $folder"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    say "not installed: there is no apt-get"
    exit 0
fi

package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
download() { (cd "$package" && apt-get download -qq prometheus 2>/dev/null); }
say "downloading Debian's package"
if ! download && ! { [ "$(id -u)" = 0 ] && apt-get update -qq && download; }; then
    say "not installed: the package cannot be had"
    exit 0
fi
mkdir -p "$folder"
dpkg-deb --extract "$package"/prometheus_*.deb "$folder"
"$folder/usr/bin/prometheus" --version 2>&1 | head -1
say "ready in $folder"
