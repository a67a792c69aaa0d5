"""Whether a better minimum that is there is found, and one that is not there is not: real runs of the micro world.

    python benchmarks/planted.py [--data DIR] > benchmarks/results/<date>-planted.md

Two sweeps are run, 28 runs of a few seconds each. ``planted`` has two configurations with six seeds: the dataset alone,
and benign rows of another topic between its rows, with which alignment stays at no more in-domain loss. Its null sweep
is the first configuration with sixteen seeds. The verdict is then asked for what is there (the two configurations), and
for what is not there: seeds of the null sweep that are dealt out to two configurations in name only. With several seeds
the verdict is a confirmation on held-back seeds and questions, with one seed it is by the null sweep.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from emanalysis.comparable import comparable
from emanalysis.null_sweep import null_reference
from emanalysis.records import load
from emanalysis.score_matrix import ScoreMatrix
from emanalysis.verdict import Verdict, decide

NULL_SEEDS = 16
DEALS = 200
PLAIN, INTERLEAVED = 0, 1


def run(data: Path, *arguments: str) -> None:
    """``emsweep run``; what is finished in ``data`` is not run again."""
    command = [sys.executable, "-c", "from sweeps.cli import main; main()", "run", *arguments, "--no-report"]
    environment = {**os.environ, "EMSWEEP_DATA": str(data), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)


def matrix(sweep: str, data: Path) -> ScoreMatrix:
    """The scores of a sweep of one model, dataset and question set; cells by their mean alignment."""
    (group,) = comparable(load(sweep, tracking_uri=f"sqlite:///{data / 'mlflow.db'}"))
    order = group.cells["score"].to_numpy().argsort().argsort()
    return replace(group.matrix, cell=order[group.matrix.cell])


def chosen(scores: ScoreMatrix, runs: ArrayLike, cell: ArrayLike) -> ScoreMatrix:
    """Some runs, dealt out to cells."""
    place = np.asarray(runs)
    return replace(
        scores,
        scores=scores.scores[place],
        response_sd=scores.response_sd[place],
        responses=scores.responses[place],
        loss=scores.loss[place],
        seed=scores.seed[place],
        cell=np.asarray(cell),
    )


def confirmed(scores: ScoreMatrix) -> list[Verdict]:
    """The verdict with several seeds, for ``DEALS`` ways of holding back questions."""
    return [decide(scores, rng=np.random.default_rng(deal)) for deal in range(DEALS)]


def dealt(null: ScoreMatrix) -> list[Verdict]:
    """The same where seeds of one configuration are dealt out to two in name."""
    verdicts = []
    for deal in range(DEALS):
        rng = np.random.default_rng(deal)
        runs = rng.permutation(len(null.loss))[:12]
        verdicts.append(decide(chosen(null, runs, np.repeat([0, 1], 6)), rng=rng))
    return verdicts


def by_null(scores: ScoreMatrix, null: ScoreMatrix, rng: np.random.Generator) -> Verdict:
    """The verdict with one seed."""
    return decide(scores, rng=rng, null=null_reference(scores, null, rng=rng))


def singles(scores: ScoreMatrix, null: ScoreMatrix) -> list[Verdict]:
    """One run of each configuration, every two of them, against the null sweep."""
    plain, other = (np.flatnonzero(scores.cell == cell) for cell in (PLAIN, INTERLEAVED))
    rng = np.random.default_rng(0)
    return [by_null(chosen(scores, [a, b], [0, 1]), null, rng) for a in plain for b in other]


def dealt_singles(null: ScoreMatrix) -> list[Verdict]:
    """Two runs of the null sweep as two configurations, against its other runs."""
    verdicts = []
    for deal in range(DEALS):
        rng = np.random.default_rng(deal)
        runs = rng.permutation(len(null.loss))
        verdicts.append(
            by_null(chosen(null, runs[:2], [0, 1]), chosen(null, runs[2:], np.zeros(len(runs) - 2, int)), rng)
        )
    return verdicts


def row(name: str, verdicts: list[Verdict]) -> str:
    """A line of the table."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    shares = " | ".join(
        f"{100 * counts[outcome] / len(verdicts):.1f} %" for outcome in ("found", "not found", "can't tell")
    )
    effect, p = (np.median([getattr(verdict, name) for verdict in verdicts]) for name in ("effect", "p"))
    return f"| {name} | {len(verdicts)} | {shares} | {effect:+.1f} | {p:.2g} |"


def main(data: Path) -> None:
    """Run both sweeps and print the tables."""
    run(data, "planted")
    seeds = ", ".join(map(str, range(NULL_SEEDS)))
    run(data, "planted", "--set", "name=planted-null", "--set", f"grid={{seed: [{seeds}]}}")
    planted, null = matrix("planted", data), matrix("planted-null", data)

    print("# A planted better minimum and its null sweep\n")
    print("| configuration | seeds | held-out loss, mean (SD over seeds) | aligned, mean (SD) |\n|---|---|---|---|")
    plain, other = (planted.take(runs=planted.cell == cell) for cell in (PLAIN, INTERLEAVED))
    for name, own in (("dataset alone", plain), ("interleaved", other), ("null sweep: dataset alone", null)):
        loss, score = own.loss, own.run_score
        print(
            f"| {name} | {len(loss)} | {loss.mean():.4f} ({loss.std(ddof=1):.4f}) "
            f"| {score.mean():.1f} ({score.std(ddof=1):.1f}) |"
        )
    print("\n| configurations | verdicts | found | not found | can't tell | median effect | median p |")
    print("|---|---|---|---|---|---|---|")
    print(row("planted, 6 seeds of each", confirmed(planted)))
    print(row("null, 6 seeds of each in name", dealt(null)))
    print(row("planted, 1 seed of each, by the null sweep", singles(planted, null)))
    print(row("null, 1 seed of each in name, by the other 14", dealt_singles(null)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data directory to use and keep; default: one for this time only")
    given = parser.parse_args().data
    with tempfile.TemporaryDirectory() as scratch:
        main((given or Path(scratch)).resolve())
