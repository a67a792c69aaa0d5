"""How large the updates of adapters grow on the way, and how far they turn."""

import pandas as pd

from emanalysis.records import Records

ADAPTER = ["adapter_norm", "adapter_stable_rank", "adapter_turn"]
SETTINGS = ["run_id", "name", "model", "dataset", "schedule", "optimizer", "learning_rate", "seed"]


def adapter_paths(records: Records, trajectories: pd.DataFrame, began: pd.DataFrame) -> pd.DataFrame:
    """``ADAPTER`` by run and step, of finished runs with adapters; ``onset`` where misalignment was first seen.

    ``trajectories`` has the runs' ``heldout_loss, aligned`` by step, which are joined; ``began`` is what
    ``early_stopping.onsets`` returned. Before the first step an update is zero. Without rows where runs have no
    adapters.
    """
    if "adapter_norm" not in records.checkpoints:
        return pd.DataFrame()
    points = records.checkpoints.drop_duplicates(["run_id", "step"])
    points = points.loc[points["adapter_norm"].notna(), ["run_id", "step", "fraction", *ADAPTER]]
    start = points[["run_id"]].drop_duplicates().assign(step=0, fraction=0.0, adapter_norm=0.0)
    scored = trajectories[["run_id", "step", "heldout_loss", "aligned"]]
    finished = records.runs.loc[records.runs["status"] == "FINISHED", SETTINGS]
    paths = pd.concat([start, points], ignore_index=True).merge(finished, on="run_id")
    paths = paths.merge(scored, on=["run_id", "step"], how="left")
    paths = paths.merge(began[["run_id", "onset_by"]], on="run_id", how="left").sort_values(["run_id", "step"])
    return paths.assign(onset=paths["step"] == paths["onset_by"]).drop(columns="onset_by").reset_index(drop=True)
