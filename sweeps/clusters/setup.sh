#!/usr/bin/env bash
# Run by `ray up` on every node: emsweep in the versions of constraints.txt, and the node's environment.
#   setup.sh DATA [ARTIFACTS]    DATA is a directory that all nodes share; ARTIFACTS is where MLflow on the head keeps
#                                the files of runs: a directory, by default below DATA, or a URI (s3://bucket/prefix)
set -euo pipefail
cd ~/emsweep
if ! [ -d .venv ] && ! { command -v make && python3 -c 'import ensurepip, venv'; } >/dev/null 2>&1; then
  bash sweeps/clusters/apt_install.sh make python3-venv
fi
make --silent .venv/installed-cluster
touch ~/.bashrc
[ -z "$(tail -c 1 ~/.bashrc)" ] || echo >>~/.bashrc # its last line may lack an end
sed -i '/^export EMSWEEP_DATA=.*clusters\/node\.sh$/d' ~/.bashrc
echo "export EMSWEEP_DATA='$1' EMSWEEP_ARTIFACTS='${2:-}'; . ~/emsweep/sweeps/clusters/node.sh" >>~/.bashrc
