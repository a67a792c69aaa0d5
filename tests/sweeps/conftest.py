"""Sweeps in processes and directories of their own, as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mlflow.entities import Run

from emtrain import names
from emtrain.tracking import SweepLog, client

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
  schedule: {name: cosine, warmup_steps: 2}
  batch_size: 4
  max_steps: 12
  max_length: 64
grid:
  optimizer.learning_rate: [3.0e-4, 1.0e-3]
  seed: [0, 1]
eval: {questions: [micro-broad, micro-narrow], samples: 3, at: [0.25, 1.0], judges: [micro-rule], max_new_tokens: 16}
"""


@dataclass
class Sweep:
    """A sweep in a directory of its own."""

    home: Path
    recipe: str = RECIPE
    started: list["subprocess.Popen[str]"] = field(default_factory=list)
    uri: str = ""

    def __post_init__(self) -> None:
        self.uri = self.uri or f"sqlite:///{self.data / 'mlflow.db'}"

    def vary(self, text: str, other: str) -> None:
        """Change the recipe."""
        assert text in self.recipe
        self.recipe = self.recipe.replace(text, other)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        (self.home / "tiny.yaml").write_text(self.recipe)
        command = [sys.executable, "-c", "from sweeps.cli import main; main()", "run", "tiny.yaml"]
        command += ["--set", "eval.samples=1", *arguments]
        inherited = {k: v for k, v in os.environ.items() if k not in {"MLFLOW_TRACKING_URI", "EMSWEEP_DATA"}}
        process = subprocess.Popen(
            command,
            cwd=self.home,
            env=inherited,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @property
    def data(self) -> Path:
        return self.home / "emsweep-data"

    def runs(self) -> dict[str, Run]:
        return SweepLog.find("tiny", uri=self.uri).runs()

    def parent(self) -> Run:
        return client(self.uri).get_run(SweepLog.find("tiny", uri=self.uri).parent_run_id)

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        return [(p.step, p.value) for p in client(self.uri).get_metric_history(run.info.run_id, metric)]

    def numbers(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Run key -> metric -> points; how long things took left out."""
        return {
            key: {metric: self.history(run, metric) for metric in run.data.metrics if not metric.startswith("time/")}
            for key, run in self.runs().items()
        }

    def check_whole(self) -> None:
        """Every planned run is there exactly once, finished, with every step and evaluation."""
        runs = client(self.uri).search_runs(
            [self.parent().info.experiment_id], f"tags.`{names.KIND}` = 'run'", max_results=100
        )
        assert len(runs) == len({run.data.tags[names.RUN_KEY] for run in runs}) == 4
        for run in runs:
            assert run.info.status == "FINISHED"
            assert [step for step, _ in self.history(run, names.TRAIN_LOSS)] == list(range(1, 13))
            assert [step for step, _ in self.history(run, names.HELDOUT_LOSS)] == [0, 3, 12]
            assert [step for step, _ in self.history(run, names.eval_metric(names.ALIGNED))] == [3, 12]

    def wait_for_a_state(self) -> None:
        """Until a run has come past an evaluation point and is still on its way."""
        self.wait_until(lambda: any((self.data / "runs" / "tiny").glob("*/state/newest.safetensors")))

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait while the sweep goes on."""
        process, deadline = self.started[-1], time.monotonic() + 300
        while not reached():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def processes(self, name: str) -> list[int]:
        """Ids of the sweep's processes that Ray calls so."""
        return [pid for pid, command in descendants(self.started[-1].pid) if command.startswith(name)]


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes below ``pid``, with their command lines."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended meanwhile
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += [(child, commands.get(child, "")) for child in frontier]
    return found


@pytest.fixture(scope="module")
def make_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Sweep]]:
    made: list[Sweep] = []

    def make() -> Sweep:
        made.append(Sweep(tmp_path_factory.mktemp("my studies, n° ")))
        return made[-1]

    yield make
    for sweep in made:
        sweep.end()
