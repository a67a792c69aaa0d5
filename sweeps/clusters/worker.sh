#!/usr/bin/env bash
# Run on a worker each time before Ray starts; a machine without the shared storage stays out of the cluster.
if [ ! -e "$EMSWEEP_MARK" ]; then
  echo "error: $(hostname) does not see the storage of the cluster: $EMSWEEP_DATA must be the same directory as on the" \
    "head ($EMSWEEP_MARK is missing). Mount it there, then run \`ray up\` again." >&2
  exit 1
fi
if ! probe=$(mktemp "$EMSWEEP_DATA/.written-by-XXXXXX") || ! rm "$probe"; then
  echo "error: $(id -un) on $(hostname) can't write to the storage of the cluster, $EMSWEEP_DATA. Let the user of the" \
    "same number write there on all machines, then run \`ray up\` again." >&2
  exit 1
fi
