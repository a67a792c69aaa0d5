"""Histories of one metric for many runs at a time, which ``MlflowClient`` has for one run only.

One run at a time cost 12 ms a metric on SQLite: 15 minutes for 2,000 runs with 40 metrics. Both ways here are MLflow's
own bulk queries, those of its web page.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pandas as pd
from mlflow.utils.rest_utils import http_request_safe

ENDPOINT = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
RUNS_PER_REQUEST = 100
POINTS_PER_REQUEST = 25_000
"""Limits of the server; it cuts what is longer without a word."""
RUNS_PER_QUERY = 500
"""A query of 500 runs took 0.07 s on SQLite, five of 100 took 0.3 s."""

Point = tuple[str, int, float]
"""Run id, step, value."""


def histories(client: mlflow.MlflowClient, run_ids: Sequence[str], metric: str) -> pd.DataFrame:
    """Every point of ``metric`` in these runs: columns ``run_id, step, value``, sorted by run and step.

    A step that was logged twice keeps the value logged last. Runs without the metric have no rows.
    """
    read = _over_http if client.tracking_uri.startswith(("http://", "https://")) else _from_database
    points = pd.DataFrame(read(client, run_ids, metric), columns=["run_id", "step", "value"])
    points = points.astype({"run_id": "str", "step": "int64", "value": "float64"})
    points = points.drop_duplicates(["run_id", "step"], keep="last")
    return points.sort_values(["run_id", "step"], kind="stable", ignore_index=True)


def _from_database(client: mlflow.MlflowClient, run_ids: Sequence[str], metric: str) -> list[Point]:
    store = client._tracking_client.store
    return [
        (point.run_id, point.step, point.value)
        for ids in _chunks(run_ids, RUNS_PER_QUERY)
        for point in store.get_metric_history_bulk(ids, metric, max_results=None)
    ]


def _over_http(client: mlflow.MlflowClient, run_ids: Sequence[str], metric: str) -> list[Point]:
    credentials = client._tracking_client.store.get_host_creds()

    def fetch(ids: Sequence[str]) -> list[Point]:
        answer = http_request_safe(credentials, ENDPOINT, "GET", params={"run_id": list(ids), "metric_key": metric})
        found = [(point["run_id"], point["step"], float(point["value"])) for point in answer.json()["metrics"]]
        if len(found) < POINTS_PER_REQUEST:
            return found
        if len(ids) == 1:
            return [(ids[0], point.step, point.value) for point in client.get_metric_history(ids[0], metric)]
        half = len(ids) // 2
        return fetch(ids[:half]) + fetch(ids[half:])

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [point for found in pool.map(fetch, _chunks(run_ids, RUNS_PER_REQUEST)) for point in found]


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
