"""What is written to MLflow, on a real SQLite store and on a real server."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier

import httpx
import pandas as pd
import pytest
from mlflow.entities import Metric, Run
from mlflow.store.tracking import sqlalchemy_store

from emtrain import names, tracking
from emtrain.tracking import (
    BATCH,
    PARAM_LIMIT,
    RunLog,
    SweepLog,
    client,
    environment_tags,
    metrics_at,
    tracking_uri,
    without_password,
)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of its own in a directory whose name wants care; making one takes seconds, so all tests share it."""
    return tracking_uri(None, tmp_path_factory.mktemp("my data & ünicode"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on the loopback interface."""
    root = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination",
        str(root / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def sweep(uri: str, request: pytest.FixtureRequest, tmp_path: Path) -> SweepLog:
    return SweepLog.open(f"sweep-{abs(hash(request.node.name))}", uri=uri, artifacts=tmp_path)


def enter(sweep: SweepLog, run_key: str = "key") -> str:
    return sweep.plan(run_key, name="a run", params={"seed": 3, "adapter.rank": 8}, tags={"more": "tags"})


def stored(sweep: SweepLog, run_id: str) -> Run:
    return client(sweep.uri).get_run(run_id)


def points(sweep: SweepLog, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client(sweep.uri).get_metric_history(run_id, metric)]


@pytest.mark.parametrize("meanwhile", [None, "made by another process"])
def test_a_store_whose_making_is_cut_off_is_not_there_and_one_that_came_first_is_kept(
    meanwhile: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "new" / "mlflow.db"

    class Store(sqlalchemy_store.SqlAlchemyStore):  # type: ignore[misc]
        def __init__(self, *arguments: str) -> None:
            super().__init__(*arguments)
            if meanwhile is None:
                raise KeyboardInterrupt
            database.write_text(meanwhile)

    with monkeypatch.context() as patch:
        patch.setattr(sqlalchemy_store, "SqlAlchemyStore", Store)
        with nullcontext() if meanwhile else pytest.raises(KeyboardInterrupt):
            tracking._make(database)
    assert [path.read_text() for path in database.parent.iterdir()] == ([meanwhile] if meanwhile else [])
    if meanwhile is None:
        assert client(f"sqlite:///{database}").search_experiments()


def test_a_planned_run_is_scheduled_and_says_what_it_is(sweep: SweepLog) -> None:
    run = stored(sweep, enter(sweep))
    assert run.info.status == "SCHEDULED"
    assert run.info.run_name == "a run"
    assert run.data.params == {"seed": "3", "adapter.rank": "8"}
    tags = {names.KIND: "run", names.RUN_KEY: "key", names.PARENT: sweep.parent_run_id, "more": "tags"}
    assert tags.items() <= run.data.tags.items()
    assert list(sweep.runs()) == ["key"]


def test_a_sweep_is_opened_twice_and_made_once(sweep: SweepLog) -> None:
    name = client(sweep.uri).get_experiment(sweep.experiment_id).name
    assert SweepLog.open(name, uri=sweep.uri) == sweep == SweepLog.find(name, uri=sweep.uri)
    parent = stored(sweep, sweep.parent_run_id)
    assert parent.data.tags[names.KIND] == "sweep"
    assert sweep.runs() == {}


def test_a_run_that_was_half_entered_gets_what_it_lacks(sweep: SweepLog) -> None:
    """The process was killed after it made the run and before it wrote its params; a tag was not known then."""
    half = client(sweep.uri).create_run(sweep.experiment_id, tags={names.KIND: "run", names.RUN_KEY: "key"})
    tags = {names.RUN_KEY: "is set already", names.MODEL_REVISION: "a commit"}
    again = sweep.plan("key", name="a run", params={"seed": 3}, tags=tags, entered=sweep.runs()["key"])
    assert again == half.info.run_id
    assert stored(sweep, again).data.params == {"seed": "3"}
    assert {names.RUN_KEY: "key", names.MODEL_REVISION: "a commit"}.items() <= stored(sweep, again).data.tags.items()
    assert sweep.plan("key", name="a run", params={"seed": 3}, tags={}, entered=sweep.runs()["key"]) == again
    assert stored(sweep, again).info.status == "SCHEDULED"


def test_of_runs_with_one_key_the_oldest_counts(sweep: SweepLog) -> None:
    first = enter(sweep)
    time.sleep(0.005)  # MLflow's clock has milliseconds
    enter(sweep)
    assert sweep.runs()["key"].info.run_id == first


def test_a_param_that_is_set_keeps_its_value(sweep: SweepLog) -> None:
    """A run may go on with another backend than it began with; MLflow would call that an error."""
    log = RunLog(sweep.uri, enter(sweep))
    log.params({"backend": "packed"})
    log.params({"backend": "trl", "family": "llama"})
    params = stored(sweep, log.run_id).data.params
    assert (params["backend"], params["family"]) == ("packed", "llama")


def test_more_params_than_mlflow_stores_of_a_value_are_cut(sweep: SweepLog) -> None:
    run_id = sweep.plan("key", name="long", params={"schedule.points": "x" * (PARAM_LIMIT + 1)}, tags={})
    assert stored(sweep, run_id).data.params["schedule.points"] == "x" * PARAM_LIMIT


def test_metrics_are_written_in_batches_and_all_of_them(sweep: SweepLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(sweep.uri, enter(sweep))
    requests: list[int] = []
    write = log._store.log_batch

    def log_batch(run_id: str, **content: list[object]) -> None:
        requests.append(len(content.get("metrics", ())))
        write(run_id, **content)

    monkeypatch.setattr(log._store, "log_batch", log_batch)
    steps = BATCH + 20
    for step in range(1, steps + 1):
        log.metrics({names.TRAIN_LOSS: 1 / step, names.TOKENS: 10.0 * step}, step=step)
    log.finish("FINISHED")
    assert points(sweep, log.run_id, names.TRAIN_LOSS) == [(step, 1 / step) for step in range(1, steps + 1)]
    assert points(sweep, log.run_id, names.TOKENS)[-1] == (steps, 10.0 * steps)
    assert sum(requests) == 2 * steps
    assert max(requests) <= BATCH
    assert len(requests) < 20  # one request a metric would be 1,040


def test_threads_that_log_at_the_same_time_lose_no_point(sweep: SweepLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trains, the others record evaluations and wait for them to be stored."""
    monkeypatch.setattr("emtrain.tracking.SEND_EVERY_SECONDS", 0.0)
    log = RunLog(sweep.uri, enter(sweep))
    monkeypatch.setattr(log._store, "log_batch", lambda run_id, metrics: sent.extend(metrics))
    sent: list[Metric] = []

    def write(metric: str) -> None:
        for step in range(2000):
            log.metrics({metric: 1.0}, step=step)
            if step % 50 == 0:
                log.flush()

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, ["a", "b", "c", "d"]))
    log.flush()
    assert Counter(metric.key for metric in sent) == dict.fromkeys("abcd", 2000)


def test_many_runs_that_begin_at_the_same_moment_do_not_wait_for_each_other_for_ever(sweep: SweepLog) -> None:
    """MLflow takes two connections of fifteen for a batch, one after the other."""
    logs = [RunLog(sweep.uri, enter(sweep, f"key {number}")) for number in range(20)]
    together = Barrier(len(logs))

    def begin(log: RunLog) -> None:
        together.wait(60)
        log.params({"family": "llama"})

    with ThreadPoolExecutor(len(logs)) as threads:
        list(threads.map(begin, logs))
    assert all(stored(sweep, log.run_id).data.params["family"] == "llama" for log in logs)


def test_what_is_queued_is_sent_after_a_while(sweep: SweepLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(sweep.uri, enter(sweep))
    log.metrics({names.TRAIN_LOSS: 1.0}, step=1)
    monkeypatch.setattr("emtrain.tracking.SEND_EVERY_SECONDS", 0.0)
    log.metrics({names.TRAIN_LOSS: 2.0}, step=2)
    for write in log._writes:
        write.result()
    assert points(sweep, log.run_id, names.TRAIN_LOSS) == [(1, 1.0), (2, 2.0)]


def test_a_run_that_is_trained_again_logs_no_point_twice(sweep: SweepLog) -> None:
    """The first attempt came to step 5 of the losses and to the evaluation at 4; the second begins at 4."""
    first = RunLog(sweep.uri, enter(sweep))
    for step in range(1, 6):
        first.metrics({names.TRAIN_LOSS: float(step)}, step=step)
    first.metrics({names.HELDOUT_LOSS: 0.4}, step=4)
    first.flush()
    second = RunLog(sweep.uri, first.run_id)
    for step in range(4, 8):
        second.metrics({names.TRAIN_LOSS: float(step), names.HELDOUT_LOSS: step / 10}, step=step)
    second.finish("FINISHED")
    assert points(sweep, first.run_id, names.TRAIN_LOSS) == [(step, float(step)) for step in range(1, 8)]
    assert points(sweep, first.run_id, names.HELDOUT_LOSS) == [(4, 0.4), (5, 0.5), (6, 0.6), (7, 0.7)]
    assert second.history(names.HELDOUT_LOSS) == [0.4, 0.5, 0.6, 0.7]


def test_base_scores_at_step_0_are_logged(sweep: SweepLog) -> None:
    log = RunLog(sweep.uri, enter(sweep))
    log.metrics({"base/micro-broad/aligned": 97.0}, step=0)
    log.flush()
    assert points(sweep, log.run_id, "base/micro-broad/aligned") == [(0, 97.0)]


def test_statuses_and_failures(sweep: SweepLog) -> None:
    run_id = enter(sweep)
    log = RunLog(sweep.uri, run_id)
    log.start()
    assert stored(sweep, run_id).info.status == "RUNNING"
    log.finish("FAILED", failure="the loss is nan at step 3")
    failed = stored(sweep, run_id)
    assert (failed.info.status, failed.data.tags[names.FAILURE]) == ("FAILED", "the loss is nan at step 3")

    again = RunLog(sweep.uri, run_id)
    again.start()
    assert names.FAILURE not in stored(sweep, run_id).data.tags
    again.finish("FINISHED")
    assert stored(sweep, run_id).info.status == "FINISHED"
    assert stored(sweep, run_id).info.end_time is not None

    sweep.set_status(run_id, "KILLED")
    assert stored(sweep, run_id).info.status == "KILLED"
    sweep.fail(run_id, "the worker died")
    assert stored(sweep, run_id).data.tags[names.FAILURE] == "the worker died"


def test_the_metrics_of_a_runs_end_are_those_recorded_at_its_last_step(sweep: SweepLog) -> None:
    """The alignment was judged at step 15 only, the loss at both, and step 30 was judged anew."""
    run_id = enter(sweep)
    log = RunLog(sweep.uri, run_id)
    log.metrics({"heldout/loss": 1.0, "eval/aligned": 95.0, "eval/coherent": 90.0}, step=15)
    log.metrics({"heldout/loss": 9.0, "eval/coherent": 50.0}, step=30)
    log.finish("FINISHED")
    sweep.rescored(stored(sweep, run_id), {30: {"eval/coherent": 40.0}, 15: {"eval/coherent": 70.0}})
    assert metrics_at(sweep.runs()["key"], 30) == {"heldout/loss": 9.0, "eval/coherent": 40.0}


def test_finished_runs_are_those_that_emsweep_trained_to_their_end_with_the_tags_asked_for(sweep: SweepLog) -> None:
    for key, tags, status in (
        ("finished", {"asked": "this"}, "FINISHED"),
        ("asked something else", {"asked": "that"}, "FINISHED"),
        ("imported", {"asked": "this", names.IMPORTED_FROM: "elsewhere"}, "FINISHED"),
        ("failed", {"asked": "this"}, "FAILED"),
    ):
        sweep.set_status(sweep.plan(key, name=key, params={}, tags=tags), status)  # type: ignore[arg-type]
    assert [run.data.tags[names.RUN_KEY] for run in sweep.finished({"asked": "this"})] == ["finished"]


def test_a_write_that_failed_in_the_background_is_not_lost_silently(
    sweep: SweepLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(sweep.uri, enter(sweep))

    def log_batch(run_id: str, **content: object) -> None:
        raise ConnectionError("the server went away")

    monkeypatch.setattr(log._store, "log_batch", log_batch)
    log.metrics({names.TRAIN_LOSS: 1.0}, step=1)
    with pytest.raises(ConnectionError, match="went away"):
        log.finish("FINISHED")
    assert stored(sweep, log.run_id).info.status == "SCHEDULED"  # not marked as finished


def test_a_run_whose_metrics_could_not_be_stored_leaves_no_gap_to_its_next_attempt(
    sweep: SweepLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch with steps 1 and 2 is lost; were that with 3 and 4 stored, the next attempt would log neither."""
    run_id = enter(sweep)
    monkeypatch.setattr(tracking, "BATCH", 2)
    log = RunLog(sweep.uri, run_id)
    log_batch, calls = log._store.log_batch, Counter[str]()

    def fails_once(run_id: str, **content: object) -> None:
        calls["made"] += 1
        if calls["made"] == 1:
            raise ConnectionError("the server went away")
        log_batch(run_id, **content)

    monkeypatch.setattr(log._store, "log_batch", fails_once)
    for step in range(1, 5):
        log.metrics({names.TRAIN_LOSS: step / 2}, step=step)
    with pytest.raises(ConnectionError, match="went away"):
        log.flush()
    log.metrics({names.TRAIN_LOSS: 2.5}, step=5)
    log.finish("FAILED", failure="the server went away")
    assert stored(sweep, run_id).info.status == "FAILED"
    assert points(sweep, run_id, names.TRAIN_LOSS) == []

    again = RunLog(sweep.uri, run_id)
    for step in range(1, 6):
        again.metrics({names.TRAIN_LOSS: step / 2}, step=step)
    again.finish("FINISHED")
    assert points(sweep, run_id, names.TRAIN_LOSS) == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 2.5)]


def test_artifacts_come_back(sweep: SweepLog, tmp_path: Path) -> None:
    log = RunLog(sweep.uri, enter(sweep))
    adapter = tmp_path / "made" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "responses.parquet").write_bytes(b"rows")
    log.artifact(adapter, "adapter")
    log.artifact(tmp_path / "responses.parquet")
    log.text(names.SPEC, "{}\n")
    sweep.write_text(names.RECIPE, "name: x\n")
    sweep.write_directory(adapter, names.REPORT)
    store = client(sweep.uri)
    found = Path(store.download_artifacts(log.run_id, "", str(tmp_path)))
    assert (found / "adapter" / "adapter_config.json").read_text() == "{}"
    assert (found / "responses.parquet").read_bytes() == b"rows"
    assert (found / "spec.json").read_text() == "{}\n"
    parents = {item.path for item in store.list_artifacts(sweep.parent_run_id)}
    assert parents == {names.RECIPE, names.REPORT}


def test_one_folder_of_a_run_is_downloaded_by_its_path_and_a_missing_one_is_none(
    sweep: SweepLog, tmp_path: Path
) -> None:
    log = RunLog(sweep.uri, enter(sweep))
    (tmp_path / "config.json").write_text("{}")
    log.artifact(tmp_path / "config.json", "adapters/10")
    (tmp_path / "copy").mkdir()
    found = sweep.download(log.run_id, "adapters/10", tmp_path / "copy")
    assert found is not None
    assert [path.name for path in found.iterdir()] == ["config.json"]
    assert sweep.download(log.run_id, "adapters/1", tmp_path / "copy") is None
    assert sweep.download(log.run_id, "adapter", tmp_path / "copy") is None


def test_tables_of_a_sweep_come_back_and_half_a_file_is_left_out_with_a_warning(
    sweep: SweepLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sweep.tables(names.GEOMETRY) == {}
    made = tmp_path / "made"
    made.mkdir()
    table = pd.DataFrame({"t": [0.0, 1.0]})
    table.to_parquet(made / "losses.parquet", index=False)
    (made / "updates.parquet").write_bytes((made / "losses.parquet").read_bytes()[:100])
    sweep.write_directory(made, names.GEOMETRY)
    found = sweep.tables(names.GEOMETRY)
    assert list(found) == ["losses"]
    assert found["losses"].equals(table)
    assert "geometry/updates.parquet can't be read and was left out" in caplog.text


def test_numbers_that_are_not_finite_are_stored_as_such(sweep: SweepLog) -> None:
    log = RunLog(sweep.uri, enter(sweep))
    log.metrics({names.HELDOUT_LOSS: math.nan}, step=1)
    log.flush()
    assert math.isnan(points(sweep, log.run_id, names.HELDOUT_LOSS)[0][1])


def test_a_deleted_sweep_is_an_error_that_says_so(uri: str, tmp_path: Path) -> None:
    sweep = SweepLog.open("deleted", uri=uri, artifacts=tmp_path)
    client(uri).delete_experiment(sweep.experiment_id)
    with pytest.raises(ValueError, match="'deleted' was deleted in MLflow; restore it"):
        SweepLog.open("deleted", uri=uri, artifacts=tmp_path)


def test_a_sweep_that_is_not_there_is_told_by_its_nearest_name(uri: str, tmp_path: Path) -> None:
    SweepLog.open("schedule-search", uri=uri, artifacts=tmp_path)
    with pytest.raises(ValueError, match=r"no sweep 'shedule-search'.*Did you mean 'schedule-search'.*Sweeps there"):
        SweepLog.find("shedule-search", uri=uri)


def test_looking_for_a_sweep_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store at sqlite:///.* yet"):
        SweepLog.find("x", uri=tracking_uri(None, tmp_path / "emsweep-data"))
    assert list(tmp_path.iterdir()) == []


SECRET = "geheim-42"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        (f"http://user:{SECRET}@127.0.0.1:9", "http://***@127.0.0.1:9"),
        (f"http://user:{SECRET}@127.0.0.1:port", "Invalid port"),
        (f"ftp://user:{SECRET}@127.0.0.1/store", "unsupported URI 'ftp://***@127.0.0.1/store'"),
        (f"postgresql://user:{SECRET}@127.0.0.1:9/mlflow", "postgresql://***@127.0.0.1:9/mlflow"),
        (f"postgresql+psycopg2://127.0.0.1:9/mlflow?user=u&password={SECRET}", "password=***"),
        ("./mlruns", "maintenance mode"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file or directory"),
    ],
)
def test_a_store_that_is_not_there_is_an_error_within_seconds_and_without_the_password(address: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"tracking\.uri: no MLflow store answers at") as caught:
        client(address)
    assert time.monotonic() - began < 15
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


class Answers:
    """A web server that is no MLflow server."""

    def __init__(self, status: str) -> None:
        self.status = status

    def __enter__(self) -> str:
        code = (
            "import http.server, sys\n"
            "class H(http.server.BaseHTTPRequestHandler):\n"
            f"    def do_GET(self): self.send_response({self.status}); self.end_headers()\n"
            "    do_POST = do_GET\n"
            "    def log_message(self, *a): pass\n"
            "s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)\n"
            "print(s.server_port, flush=True)\n"
            "s.serve_forever()\n"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        return f"user:{SECRET}@127.0.0.1:{int(self.process.stdout.readline())}"

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.mark.parametrize("status", ["401", "404", "503"])
def test_a_server_that_will_not_have_us_is_an_error_without_the_password(status: str) -> None:
    """The HTTP libraries put the whole address, password included, into what they say."""
    with Answers(status) as place, pytest.raises(ValueError, match=status) as caught:
        client(f"http://{place}")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h:5000/x", "http://***@h:5000/x"),
        (
            "can't reach postgresql://u:p%40@h/db, nor mysql://v:q@h",
            "can't reach postgresql://***@h/db, nor mysql://***@h",
        ),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://h:5000", "http://h:5000"),
        ("postgresql://h/db?password=p&user=u", "postgresql://h/db?password=***&user=***"),
        ("no http://h/x?token=t&Key=k, says h", "no http://h/x?token=***&Key=*** says h"),
        ("password=p", "password=***"),
    ],
)
def test_passwords_are_starred_out(text: str, shown: str) -> None:
    assert without_password(text) == shown


def test_where_a_sweep_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri("sqlite:///own.db", tmp_path) == "sqlite:///own.db"
    assert tracking_uri(None, tmp_path) == "http://127.0.0.1:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    for odd in ("odd?a=b", "odd#1"):
        with pytest.raises(ValueError, match=r"EMSWEEP_DATA: .*/odd.*/mlflow\.db, and .* ends at '[?#]'"):
            tracking_uri(None, tmp_path / odd)
        assert tracking_uri("sqlite:///own.db", tmp_path / odd) == "sqlite:///own.db"


def test_versions_and_commit_are_tags_and_neither_git_nor_a_repository_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"}
    for key, value in {**git, "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    versions = json.loads(environment_tags()[names.VERSIONS])
    assert {"emsweep", "torch", "transformers", "trl", "peft"} <= versions.keys()
    assert names.GIT_COMMIT not in environment_tags()
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert environment_tags()[names.GIT_COMMIT] == head
    monkeypatch.setenv("PATH", str(tmp_path))
    assert names.GIT_COMMIT not in environment_tags()
