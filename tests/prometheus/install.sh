#!/usr/bin/env bash
# install.sh DIR: unpacks Debian's package prometheus there; does nothing where prometheus and
# promtool are in DIR or on the PATH. It is not installed, so that no service starts.
set -euo pipefail
if [ -x "$1/usr/bin/promtool" ]; then exit 0; fi
if command -v prometheus > /dev/null && command -v promtool > /dev/null; then exit 0; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
(cd "$folder" && { apt-get download --quiet prometheus || { apt-get update --quiet && apt-get download --quiet prometheus; }; })
mkdir -p "$1"
dpkg-deb --extract "$folder"/prometheus_*.deb "$1"
"$1/usr/bin/promtool" --version
