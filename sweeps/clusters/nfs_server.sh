#!/usr/bin/env bash
# Run by `ray up` on the head of a cloud cluster: its disk becomes the storage that all nodes share.
set -euo pipefail
bash ~/emsweep/sweeps/clusters/apt_install.sh nfs-kernel-server
sudo install -d -o "$(id -un)" "$EMSWEEP_DATA"
# Private addresses only. On AWS Ray's security group lets in none of them that is not of this cluster; on Google Cloud
# the default network lets in every machine of the project.
sudo mkdir -p /etc/exports.d # no package makes it
for network in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16; do
  echo "$EMSWEEP_DATA $network(rw,sync,no_subtree_check)"
done | sudo tee /etc/exports.d/emsweep.exports >/dev/null
sudo exportfs -ra
