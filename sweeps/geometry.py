"""What lies between and around the runs of a sweep, measured on their adapters: lines, angles and balls.

The parent run keeps what was measured as tables (``names.GEOMETRY_TABLES``), keyed by run and step, and only what is
not in them is measured. Every task downloads the adapters it needs and is one call to an actor that holds the base.
"""

import functools
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import ray
from ray.util.actor_pool import ActorPool

from emeval.evaluate import judge_responses
from emtrain import names
from emtrain.mistakes import gist
from emtrain.seeds import derive
from emtrain.spec import RunSpec
from emtrain.tracking import SweepLog
from sweeps import cluster
from sweeps.connection import Connection
from sweeps.inputs import base_model, data_of
from sweeps.lease import base_of
from sweeps.planner import Evaluation
from sweeps.record import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emtrain.low_rank import Update
    from emtrain.train import TrainingData

log = logging.getLogger(__name__)

RANDOM_RADIUS, DRAWS = 1.0, 8
"""Length of the steps in random directions, as a share of the update's norm, and how many. They hardly matter: on
micro-llama one as long as the update itself costs 0.001 nats."""
UPHILL_RADIUS, UPHILL_STEPS = 0.1, 8
"""Likewise of the step uphill. On micro-llama it costs 0.4 to 0.9 nats, and 3 % more or less from another start."""
DEATHS = 2
"""How often a task is given out anew after the loss of its machine."""

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Place:
    """A run's adapter after ``step`` updates, and what it was trained on."""

    run_id: str
    name: str
    """Of the run."""
    step: int
    artifact: str
    spec: RunSpec
    digests: tuple[str, str | None]
    """sha256 of its dataset's file, and of the interleaved one's."""
    revision: str | None
    """Of its model (``emtrain.revision``); None where that is not known."""


@dataclass(frozen=True)
class Line:
    """Losses and alignment on the straight line between two updates, at these points from ``a`` (0) to ``b`` (1)."""

    a: Place
    b: Place
    losses_at: Sequence[float]
    asked_at: Sequence[float]

    @property
    def label(self) -> str:
        """What is measured, for people."""
        return (
            f"from {self.a.name} to {self.b.name}: loss at {len(self.losses_at)} points, "
            f"alignment at {len(self.asked_at)}"
        )

    def measure(self, surveyor: "Surveyor") -> Tables:
        """Rows of ``losses`` and ``responses``."""
        from emeval.generate import ask
        from emtrain.heldout import row_losses
        from emtrain.landscape import between, moved

        model, tokenizer, data = surveyor.at(self.a)
        a, b = surveyor.update(self.a), surveyor.update(self.b)
        evaluation = surveyor.evaluation
        parts: dict[str, list[pd.DataFrame]] = {"losses": [], "responses": []}
        for t in sorted({*self.losses_at, *self.asked_at}):
            point: dict[str, Any] = dict(zip(names.LINE, (*key(self.a, self.b), t), strict=True))
            with moved(model, between(a, b, t)):
                if t in self.losses_at:
                    losses, tokens = row_losses(model, data.heldout)
                    rows = pd.DataFrame({"row": range(len(losses)), "loss": losses.numpy(), "tokens": tokens.numpy()})
                    parts["losses"].append(rows.assign(**point))
                if t not in self.asked_at:
                    continue
                # Every point draws from the same streams, so that less of the differences is luck.
                (responses,) = ask(
                    model, tokenizer, evaluation.question_sets, evaluation.spec, seeds=[derive(0, "geometry")]
                )
            judged = judge_responses(responses, surveyor.judges, step=0).drop(columns="step")
            parts["responses"].append(judged.assign(**point))
        return {
            table: pd.concat(rows, ignore_index=True)[list(names.GEOMETRY_TABLES[table])]
            for table, rows in parts.items()
            if rows
        }


@dataclass(frozen=True)
class Angles:
    """How the updates of several runs lie to each other."""

    pairs: Sequence[tuple[Place, Place]]

    @property
    def label(self) -> str:
        """What is measured, for people."""
        return f"angles between the updates of {len(self.pairs)} pairs"

    def measure(self, surveyor: "Surveyor") -> Tables:
        """Rows of ``updates``."""
        from emtrain.low_rank import cosine, norm, subspaces

        update = functools.cache(surveyor.update)
        rows = []
        for a, b in self.pairs:
            spaces = subspaces(update(a), update(b))
            lying = [(side.overlap, side.by_chance, side.angle) for side in spaces] if spaces else [(math.nan,) * 3] * 2
            whole = (cosine(update(a), update(b)), norm(update(a)), norm(update(b)))
            rows.append((*key(a, b), *whole, *lying[0], *lying[1]))
        return {"updates": pd.DataFrame(rows, columns=list(names.GEOMETRY_TABLES["updates"]))}


@dataclass(frozen=True)
class Ball:
    """Losses a step away from a run's update: in random directions, and uphill."""

    place: Place

    @property
    def label(self) -> str:
        """What is measured, for people."""
        return f"around {self.place.name}: loss in {DRAWS} directions and uphill"

    def measure(self, surveyor: "Surveyor") -> Tables:
        """Rows of ``sharpness``."""
        import torch

        from emtrain.heldout import heldout_loss
        from emtrain.landscape import backward_heldout_loss, climb, moved, random_direction

        model, _, data = surveyor.at(self.place)
        update = surveyor.update(self.place)

        def loss_at(step: "Update") -> float:
            with moved(model, step):
                return backward_heldout_loss(model, data.heldout)

        with moved(model, update):
            found = [("none", 0.0, 0, heldout_loss(model, data.heldout).per_token)]
            for draw in range(DRAWS):
                generator = torch.Generator().manual_seed(derive(0, "geometry", "direction", draw))
                with moved(model, random_direction(update, length=RANDOM_RADIUS, generator=generator)) as there:
                    found.append(("random", RANDOM_RADIUS, draw, heldout_loss(there, data.heldout).per_token))
            generator = torch.Generator().manual_seed(derive(0, "geometry", "uphill"))
            start = random_direction(update, length=UPHILL_RADIUS, generator=generator)
            found.append(("adversarial", UPHILL_RADIUS, 0, climb(loss_at, start, steps=UPHILL_STEPS)))
        rows = [(self.place.run_id, self.place.step, *row) for row in found]
        return {"sharpness": pd.DataFrame(rows, columns=list(names.GEOMETRY_TABLES["sharpness"]))}


Task = Line | Angles | Ball


class Surveyor:
    """Measures, on a base model that it keeps. Made as a Ray actor, one per device."""

    def __init__(self, sweep: SweepLog, setting: Setting, evaluation: Evaluation) -> None:
        self.sweep, self.evaluation, self.data_dir = sweep, evaluation, setting.data_dir
        self.judges = setting.judges(evaluation.spec.judges)

    def measure(self, task: Task) -> tuple[Task, Tables, str | None]:
        """The task, the rows that it adds to the tables, and, where there are none, why."""
        try:
            return task, task.measure(self), None
        except Exception as error:
            log.exception("a task failed")
            return task, {}, gist(error)

    def at(self, place: Place) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, TrainingData]":
        """The base model, its tokenizer and the data of a run. Raises ``ValueError`` when they can't be had."""
        spec = place.spec
        model, tokenizer = base_model(*base_of(spec), place.revision)
        data = data_of(spec, place.digests, revision=place.revision, data_dir=self.data_dir)
        return model.requires_grad_(False), tokenizer, data

    def update(self, place: Place) -> "Update":
        """What the adapter adds to the weights. Raises ``ValueError`` when the run has not kept it."""
        from emtrain.low_rank import load_update

        device = base_model(*base_of(place.spec), place.revision)[0].device
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.sweep.download(place.run_id, place.artifact, Path(scratch))
            if folder is None:
                raise ValueError(
                    f"run {place.name} has no artifact {place.artifact}: resources.keep_weights left it out, or it was "
                    "removed"
                )
            return load_update(folder, device=device)


def key(a: Place, b: Place) -> tuple[str, int, str, int]:
    """The values of ``names.PAIR``."""
    return a.run_id, a.step, b.run_id, b.step


def load_tables(sweep: SweepLog) -> Tables:
    """What was measured so far; tables without rows where nothing was."""
    stored = sweep.tables(names.GEOMETRY)
    return {table: stored.get(table, pd.DataFrame(columns=list(of))) for table, of in names.GEOMETRY_TABLES.items()}


def places(sweep: SweepLog, pairs: pd.DataFrame, evaluation: Evaluation) -> dict[tuple[str, int], Place]:
    """The runs of ``pairs`` (columns ``names.PAIR``) at their steps.

    Raises ``ValueError`` when they were asked other questions than those of ``evaluation``.
    """
    runs = {run.info.run_id: run for run in sweep.runs().values()}
    ends = dict.fromkeys(
        (run_id, step)
        for side in ("a", "b")
        for run_id, step in pairs[[f"run_{side}", f"step_{side}"]].itertuples(index=False)
    )
    found = {}
    for run_id, step in ends:
        run = runs[run_id]
        asked = run.data.tags[names.QUESTIONS_SHA256].split()
        for questions in evaluation.question_sets:
            if f"{questions.name}:{questions.sha256}" not in asked:
                raise ValueError(
                    f"eval.questions: {questions.name} is not the set that run {run.info.run_name!r} was asked; "
                    "bring back the file as it was"
                )
        artifact = names.adapter_artifact(int(step), int(run.data.params["total_steps"]))
        spec = RunSpec.model_validate(sweep.spec(run))
        found[run_id, step] = Place(
            run_id,
            run.info.run_name,
            int(step),
            artifact,
            spec,
            (run.data.tags[names.DATASET_SHA256], run.data.tags.get(names.INTERLEAVED_SHA256)),
            run.data.tags.get(names.MODEL_REVISION),
        )
    return found


def outstanding(
    pairs: pd.DataFrame,
    there: Mapping[tuple[str, int], Place],
    kept: Tables,
    *,
    losses_at: Sequence[float],
    asked_at: Sequence[float],
) -> list[Task]:
    """What of ``pairs`` is not in the tables yet, tasks with one base next to each other.

    Points count as measured from a table of 6 digits, so that a finer line needs only the points in between.
    """
    done = {
        table: set(_rows(kept[table].assign(t=kept[table]["t"].astype(float).round(6)), names.LINE))
        for table in ("losses", "responses")
    }
    angles = set(_rows(kept["updates"], names.PAIR))
    balls = set(_rows(kept["sharpness"], ("run_id", "step")))

    def left(table: str, ends: tuple[str, int, str, int], points: Sequence[float]) -> tuple[float, ...]:
        return tuple(t for t in points if (*ends, round(t, 6)) not in done[table])

    tasks: list[Task] = []
    for _, group in pairs.groupby(["model", "dataset"], sort=False):
        lines = [
            (there[run_a, step_a], there[run_b, step_b])
            for run_a, step_a, run_b, step_b in group[list(names.PAIR)].itertuples(index=False)
        ]
        ends = sorted({end for line in lines for end in line}, key=lambda place: (place.run_id, place.step))
        between = [pair for pair in combinations(ends, 2) if key(*pair) not in angles]
        if between:
            tasks.append(Angles(between))
        tasks += [Ball(place) for place in ends if (place.run_id, place.step) not in balls]
        for a, b in lines:
            line = Line(a, b, left("losses", key(a, b), losses_at), left("responses", key(a, b), asked_at))
            if line.losses_at or line.asked_at:
                tasks.append(line)
    return tasks


def _rows(table: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return table[list(columns)].itertuples(index=False, name=None)


def survey(
    sweep: SweepLog,
    setting: Setting,
    evaluation: Evaluation,
    tasks: Sequence[Task],
    kept: Tables,
    *,
    address: str | None,
) -> Iterator[tuple[Task, str | None]]:
    """Carry out ``tasks`` on the Ray at ``address`` (None: one of this process's own), each result kept at once.

    Yields each task when it is over, and why it failed, or None.
    """
    if not tasks:
        return
    with Connection(address) as connection:
        connection.open()
        capacity = cluster.Capacity.of(ray.cluster_resources()) if connection.own else cluster.capacity()
        make = ray.remote(Surveyor).options(
            num_cpus=1, num_gpus=capacity.gpus_per_engine, max_restarts=-1, max_task_retries=DEATHS
        )
        pool = ActorPool([make.remote(sweep, setting, evaluation) for _ in range(min(capacity.engines, len(tasks)))])
        for task in tasks:
            pool.submit(lambda surveyor, task: surveyor.measure.remote(task), task)
        while pool.has_next():
            task, measured, failure = pool.get_next_unordered()
            _keep(sweep, kept, measured)
            yield task, failure


def _keep(sweep: SweepLog, kept: Tables, measured: Tables) -> None:
    """Add rows to the tables, here and in MLflow."""
    with tempfile.TemporaryDirectory() as scratch:
        for table, rows in measured.items():
            kept[table] = pd.concat([kept[table], rows], ignore_index=True) if len(kept[table]) else rows
            kept[table].to_parquet(Path(scratch) / f"{table}.parquet", index=False)
        if measured:
            sweep.write_directory(Path(scratch), names.GEOMETRY)
