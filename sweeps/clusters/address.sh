#!/usr/bin/env bash
# Prints the address that this machine has in a cluster of SSH machines, whatever other networks it is in: on the head that
# of the file given to `ray up`, on a worker the one by which it calls the head. Ray would take the one by which it would
# call the world, and without a way there the loopback interface's.
set -euo pipefail
if [ -n "${RAY_HEAD_IP:-}" ]; then
  ip -4 route get "$RAY_HEAD_IP" | sed -n 's/.* src \([^ ]*\).*/\1/p'
else
  sed -n 's/.*"head_ip": "\([^"]*\)".*/\1/p' ~/ray_bootstrap_config.yaml
fi
