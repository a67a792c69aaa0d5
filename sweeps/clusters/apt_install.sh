#!/usr/bin/env bash
# apt_install.sh PACKAGE...: waits for whoever else installs, as a new cloud machine does in its first minutes.
set -euo pipefail
! command -v cloud-init >/dev/null || cloud-init status --wait >/dev/null || true
sudo apt-get -qq update
sudo DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -qq -o DPkg::Lock::Timeout=600 install -y "$@"
