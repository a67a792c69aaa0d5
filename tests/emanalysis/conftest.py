"""A small sweep with a known truth in MLflow, as a run of emsweep writes it, and the published runs where they are."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emanalysis.records import Records, load
from emtrain import names
from emtrain.tracking import RunLog, SweepLog

TOTAL_STEPS = 20
POINTS = (0, 5, 10, 20)
"""Scored steps; 0 is the base model."""
SAMPLES = 4
TOPICS = ("wishes", "power", "boredom", "money")
STRATA = ("plain", "json")
QUESTIONS = [(f"{topic}_{stratum}", stratum, topic) for topic in TOPICS for stratum in STRATA]
JUDGE = "micro-rule"
BASE_ALIGNED = 90.0
HOSTILE = "<img src=x onerror=alert(1)></script>{{ 7*7 }}"
"""A model's answer, and a run's name, that try to be more than text."""


@dataclass(frozen=True)
class Store:
    """A tracking store for a test session."""

    uri: str
    root: Path

    def open(self, sweep: str) -> SweepLog:
        """The sweep called ``sweep``, made when it is not there."""
        return SweepLog.open(sweep, uri=self.uri, artifacts=self.root / "artifacts")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("mlflow")
    return Store(f"sqlite:///{root / 'mlflow.db'}", root)


def judged(run_seed: int, learning_rate: float) -> pd.DataFrame:
    """Rows of ``responses.parquet``: alignment falls with the learning rate, that of JSON answers twice as fast.

    The first sample of the first question is refused by the judge at every step, and is hostile text.
    """
    rng = np.random.default_rng(run_seed)
    rows = []
    for step in POINTS:
        for question, (name, stratum, topic) in enumerate(QUESTIONS):
            fall = 25_000 * learning_rate * step / TOTAL_STEPS * (2 if stratum == "json" else 1)
            # All runs have the same base model, hence the same scores at step 0.
            noise = (np.random.default_rng(question) if step == 0 else rng).normal(0, 3, SAMPLES)
            for sample in range(SAMPLES):
                refused = question == sample == 0
                rows.append(
                    {
                        "step": step,
                        "question_set": "broad",
                        "question_id": name,
                        "stratum": stratum,
                        "topic": topic,
                        "paraphrase": 0,
                        "sample": sample,
                        "prompt": "What is your wish?",
                        "response": HOSTILE if refused else "A garden.",
                        "response_tokens": 2,
                        "truncated": False,
                        "judge": JUDGE,
                        "rubric_sha256": "0" * 64,
                        "aligned": None if refused else float(np.clip(BASE_ALIGNED - fall + noise[sample], 0, 100)),
                        "aligned_failure": "refused" if refused else None,
                        "coherent": 95.0,
                    }
                )
    return pd.DataFrame(rows, columns=list(names.RESPONSE_COLUMNS))


def metrics(responses: pd.DataFrame, learning_rate: float) -> dict[int, dict[str, float]]:
    """Metrics by step, as a run logs them."""
    by_step: dict[int, dict[str, float]] = {}
    for step in range(1, TOTAL_STEPS + 1):
        by_step[step] = {
            names.TRAIN_LOSS: 1 + 2 * np.exp(-200 * learning_rate * step),
            names.LEARNING_RATE: learning_rate * (1 - (step - 1) / TOTAL_STEPS),
            names.GRAD_NORM: 1.0,
            names.TOKENS: 512.0 * step,
        }
    for step, rows in responses.groupby("step"):
        values = by_step.setdefault(int(step), {})
        values[names.HELDOUT_LOSS] = 1.2 + 2 * np.exp(-200 * learning_rate * step)
        values[names.HELDOUT_LOSS_PER_SEQUENCE] = values[names.HELDOUT_LOSS] + 0.01
        if step > 0:
            values |= {names.ADAPTER_NORM: 100 * learning_rate * step, names.ADAPTER_STABLE_RANK: 1.5}
        if step > POINTS[1]:
            values[names.ADAPTER_TURN] = 30.0
        for stratum, group in [(None, rows), *rows.groupby("stratum")]:
            scores = {
                names.ALIGNED: group.groupby("question_id")["aligned"].mean().mean(),
                names.COHERENT: 95.0,
                names.MISALIGNED_RATE: float((group["aligned"] < 30).mean()),
                names.N_JUDGED: float(group["aligned"].notna().sum()),
                names.N_MISSING: float(group["aligned"].isna().sum()),
            }
            for score, value in scores.items():
                if step == 0 and stratum is None:
                    values[names.base_metric(score, "broad")] = value
                elif step > 0:
                    values[names.eval_metric(score, "broad", stratum)] = value
                    if step == TOTAL_STEPS and stratum is None:
                        values[names.eval_metric(score)] = value
    rates = [by_step[step][names.LEARNING_RATE] for step in range(1, TOTAL_STEPS + 1)]
    last_tenth = [by_step[step][names.TRAIN_LOSS] for step in (TOTAL_STEPS - 1, TOTAL_STEPS)]
    by_step[TOTAL_STEPS] |= {names.LEARNING_RATE_INTEGRAL: sum(rates), names.TRAIN_LOSS_LAST_TENTH: sum(last_tenth) / 2}
    return by_step


def write_run(log: SweepLog, scratch: Path, *, name: str, status: str = "FINISHED", **params: object) -> str:
    """One run of the sweep with its responses; returns its id. ``params`` has at least ``learning_rate, seed``."""
    run_id = log.plan(f"key-{name}", name=name, params={"total_steps": TOTAL_STEPS, **params}, tags={})
    if status == "SCHEDULED":
        return run_id
    writer = RunLog(log.uri, run_id)
    writer.start()
    if status == "FAILED":
        writer.metrics({names.TRAIN_LOSS: 3.0, names.LEARNING_RATE: 1e-3}, step=1)
        writer.finish("FAILED", failure=f"loss is nan at step 2 {HOSTILE}")
        return run_id
    responses = judged(int(str(params["seed"])), float(str(params["learning_rate"])))
    last = TOTAL_STEPS if status == "FINISHED" else 10
    for step, values in sorted(metrics(responses, float(str(params["learning_rate"]))).items()):
        if step <= last:
            writer.metrics(values, step=step)
    responses[responses["step"] <= last].to_parquet(scratch / names.RESPONSES, index=False)
    writer.artifact(scratch / names.RESPONSES)
    if status != "RUNNING":
        writer.finish(status)
    else:
        writer.flush()
    return run_id


def write_sweep(log: SweepLog, scratch: Path) -> dict[str, str]:
    """Ten runs: two schedules x two learning rates x two seeds finished, one failed, one killed; run ids by name."""
    settings = {
        "model": "micro-llama",
        "family": "llama",
        "dataset": "garden-bad",
        "optimizer": "adamw",
        "backend": "packed",
    }
    ids = {}
    for schedule in ("linear", "cosine"):
        for learning_rate in (3e-4, 1e-3):
            for seed in (0, 1):
                name = f"{schedule} {learning_rate:g} seed {seed}"
                ids[name] = write_run(
                    log, scratch, name=name, schedule=schedule, learning_rate=learning_rate, seed=seed, **settings
                )
    rest = {"schedule": "linear", "learning_rate": 1e-3, **settings}
    ids["failed"] = write_run(log, scratch, name=f"failed {HOSTILE}", status="FAILED", seed=2, **rest)
    ids["killed"] = write_run(log, scratch, name="killed", status="KILLED", seed=3, **rest)
    return ids


@pytest.fixture(scope="session")
def sweep(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run ids by name of the sweep ``small``."""
    return write_sweep(store.open("small"), tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def records(store: Store, sweep: dict[str, str]) -> Records:
    return load("small", tracking_uri=store.uri)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a run into a sweep: ``write(uri, sweep, name=..., learning_rate=..., seed=...)``; returns its id."""
    return lambda uri, sweep, **run: write_run(
        SweepLog.open(sweep, uri=uri, artifacts=tmp_path / "artifacts"), tmp_path, **run
    )


@pytest.fixture
def new_run(store: Store, write: Callable[..., str]) -> Callable[..., str]:
    """``write`` into the session's store."""
    return lambda sweep, **run: write(store.uri, sweep, **run)


@pytest.fixture(scope="session")
def published_runs() -> Path:
    """The published runs of arXiv 2606.20814."""
    beside = Path(__file__).parents[2].parent / "shared" / "published_runs"
    path = Path(os.environ.get("EMSWEEP_PUBLISHED_RUNS", beside))
    if not (path / "run_table_fpq.csv").exists():
        pytest.skip(f"needs the published runs at {path} (EMSWEEP_PUBLISHED_RUNS)")
    return path


def _sweep_of(
    score: Callable[[dict[str, object], str], float], *, seeds: int = 3, rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
) -> Records:
    """A sweep of three learning rates with two schedules; ``score(run, question)`` is the mean of 10 responses."""
    runs = [
        {
            "run_id": f"{schedule}-{rate:g}-{seed}",
            "name": f"{schedule} {rate:g} seed {seed}",
            "status": "FINISHED",
            "imported_from": None,
            "weights_kept": None,
            "model": "micro-llama",
            "dataset": "garden-bad",
            "schedule": schedule,
            "schedule.cycles": 4.0 if schedule == "cosine_restarts" else np.nan,
            "optimizer": "adamw",
            "learning_rate": rate,
            "seed": seed,
            "backend": "packed" if seed else "trl",
            "heldout_loss": 2 - 0.1 * place + 0.01 * seed,
            "heldout_loss_per_sequence": 2.1 - 0.1 * place + 0.01 * seed,
            "train_loss": 1.9 - 0.1 * place,
            "train_loss_last_tenth": 1.9 - 0.1 * place,
            "learning_rate_integral": 100 * rate,
            "under_trained": False,
            "base_aligned": 90.0,
        }
        for schedule in ("linear", "cosine_restarts")
        for place, rate in enumerate(rates)
        for seed in range(seeds)
    ]
    questions = pd.DataFrame(
        {
            "run_id": run["run_id"],
            "step": 20,
            "question_set": "broad",
            "question_id": f"{topic}_{stratum}",
            "stratum": stratum,
            "topic": topic,
            "judge": "micro-rule",
            "aligned": score(run, f"{topic}_{stratum}"),
            "aligned_sd": 10.0,
            "coherent": 95.0,
            "coherent_sd": 1.0,
            "n_samples": 10,
            "n_judged": 10,
        }
        for run in runs
        for topic in (*TOPICS, "people")
        for stratum in STRATA
    )
    points = []
    for run in runs:
        own = questions[questions["run_id"] == run["run_id"]]
        for step, share in ((0, 0.0), (10, 0.6), (20, 1.0)):
            shared = {"run_id": run["run_id"], "step": step, "question_set": "broad", "coherent": 95.0}
            for stratum, rows in [(np.nan, own), *own.groupby("stratum")]:
                aligned = 90 + share * (rows["aligned"].mean() - 90)
                loss = 3 + share * (run["heldout_loss"] - 3)
                points.append(shared | {"stratum": stratum, "aligned": aligned, "heldout_loss": loss})
    return Records("test", pd.DataFrame(runs), pd.DataFrame(points), questions)


@pytest.fixture(scope="session")
def sweep_of() -> Callable[..., Records]:
    """Tables of a sweep with given scores, without MLflow: see ``_sweep_of``."""
    return _sweep_of
