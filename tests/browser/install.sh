#!/usr/bin/env bash
# install.sh: installs Debian's Chromium, unless there is one; without it the tests are skipped.
set -euo pipefail
if command -v chromium chromium-browser > /dev/null || [ -n "${PDLAUNCH_TEST_CHROMIUM:-}" ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "install.sh: Chromium is missing, and only root can install it with apt-get" >&2
  exit 1
fi
apt-get install --yes --quiet --no-install-recommends chromium \
  || { apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium; }
