# The environment of a cluster's node. ~/.bashrc reads it, so what `ray up` runs there, Ray, and every process of Ray's
# have it. EMSWEEP_DATA is set before: a directory that all nodes share.
export PATH="$HOME/emsweep/.venv/bin:$PATH"
export EMSWEEP_CACHE="$EMSWEEP_DATA/cache" # models are built or converted once for all nodes
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
set -a
. ~/.emsweep/cluster.env
set +a
# The head makes this file. A machine that does not see it does not see the head's disk.
export EMSWEEP_MARK="$EMSWEEP_DATA/.cluster-$(printf %s "$RAY_AUTH_TOKEN" | sha256sum | cut -c1-16)"
