#!/usr/bin/env bash
# install.sh DIR: makes an environment with the client libraries; does nothing where there is one.
# They need other versions of some packages than pdlaunch and its tests, so they stay apart.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
stamp="$1/.installed"
if [ "$stamp" -nt "$here/requirements.txt" ]; then exit 0; fi
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt"
touch "$stamp"
