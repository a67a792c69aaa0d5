# Read by the head's shell before `ray start`: starts MLflow, and leaves its address to Ray and the jobs on it.
# NODE_ADDRESS is that of the head in the cluster; where it is not set, the one by which it would call the world.
mkdir -p "$EMSWEEP_DATA" && touch "$EMSWEEP_MARK" &&
  MLFLOW_TRACKING_URI=$(python -m sweeps.mlflow_server start --store postgresql+psycopg2:///mlflow \
    ${NODE_ADDRESS:+--address "$NODE_ADDRESS"}) &&
  export MLFLOW_TRACKING_URI
