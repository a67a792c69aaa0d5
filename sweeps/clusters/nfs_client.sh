#!/usr/bin/env bash
# Run on a worker of a cloud cluster each time before Ray starts: mounts the head's storage at the same path.
set -euo pipefail
! mountpoint -q "$EMSWEEP_DATA" || exit 0
command -v mount.nfs4 >/dev/null || bash ~/emsweep/sweeps/clusters/apt_install.sh nfs-common
sudo mkdir -p "$EMSWEEP_DATA"
sudo mount -t nfs4 "$RAY_HEAD_IP:$EMSWEEP_DATA" "$EMSWEEP_DATA"
