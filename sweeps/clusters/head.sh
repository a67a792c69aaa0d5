# Read by the head's shell before `ray start`: starts MLflow, and leaves its address to Ray and the jobs on it.
mkdir -p "$EMSWEEP_DATA" && touch "$EMSWEEP_MARK" &&
  MLFLOW_TRACKING_URI=$(python -m sweeps.mlflow_server start --store postgresql+psycopg2:///mlflow) &&
  export MLFLOW_TRACKING_URI
