#!/usr/bin/env bash
# Run by `ray up` on the head of a cloud cluster: its disk becomes the storage that all nodes share.
set -euo pipefail
bash ~/emsweep/sweeps/clusters/apt_install.sh nfs-kernel-server
sudo install -d -o "$(id -un)" "$EMSWEEP_DATA"
# Private addresses only, and of those the cloud's firewall lets in none that are not of this cluster.
for network in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16; do
  echo "$EMSWEEP_DATA $network(rw,sync,no_subtree_check)"
done | sudo tee /etc/exports.d/emsweep.exports >/dev/null
sudo exportfs -ra
