#!/usr/bin/env bash
# interface.sh DIR VERSION...: leaves the interface of KV connectors of each vLLM as DIR/VERSION.py.
# The wheel of a version has 400 MB; it is fetched once, and nothing else of it is kept.
set -euo pipefail
mkdir -p "$1"
for version in "${@:2}"; do
  if [ -e "$1/$version.py" ]; then continue; fi
  folder=$(mktemp --directory --tmpdir="$1")
  trap 'rm -rf "$folder"' EXIT
  "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps \
    --only-binary :all: --dest "$folder" "vllm==$version"
  "${PYTHON:-python3}" - "$folder"/*.whl > "$folder/base.py" <<'P'
import sys
import zipfile

path = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
with zipfile.ZipFile(sys.argv[1]) as wheel:
    sys.stdout.buffer.write(wheel.read(path))
P
  mv "$folder/base.py" "$1/$version.py"
  rm -rf "$folder"
done
