"""The ``emsweep`` command. The only module that prints or exits.

Exit codes: 0 all is well, 1 a run failed, 2 the user's mistake, 130 stopped by the user.
"""

import atexit
import errno
import gc
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sweeps import tables
from sweeps.terminal import literal

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from sweeps.connection import Connection
    from sweeps.planner import SweepPlan
    from sweeps.recipe import Recipe

app = typer.Typer(
    name="emsweep",
    help="Sweeps of emergent-misalignment fine-tuning runs: one recipe in, MLflow and a report out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True, emoji=False)
err = Console(stderr=True, soft_wrap=True, emoji=False)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="R", help="A shipped recipe's name, or the path of a .yaml file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe (dotted); may be repeated."),
]
SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep's name (the recipe's `name`).")]
UriOption = Annotated[
    str | None, typer.Option("--uri", help="MLflow tracking URI; default MLFLOW_TRACKING_URI, else ./emsweep-data.")
]
TUNNEL = "http://127.0.0.1:8265"
"""Where `emsweep ui --cluster` has the Ray of a cluster."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def main() -> None:
    """Entry point of the console command."""
    # Most of what is made is imported and stays. To look it through for garbage takes a seventh of the time of a start,
    # and a second at the end.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of the libraries, which no user can act on; python -W brings them back
    with _explained():
        app()


@contextmanager
def _explained() -> Iterator[None]:
    """A user's mistake is a message and exit code 2, never a traceback; a full disk one and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            err.print(f"[red]error:[/] {literal(line)}" if not line.startswith(" ") else literal(line), highlight=False)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SystemExit(1 if full else 2) from None
    except KeyboardInterrupt:
        err.print("stopped")
        raise SystemExit(130) from None
    except Exception as error:
        if not type(error).__module__.startswith("mlflow."):  # which is not imported to say --help
            raise
        from emtrain.mistakes import gist

        err.print(f"[red]error:[/] MLflow: {literal(gist(error))}; what is finished is kept", highlight=False)
        raise SystemExit(1) from None


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Of training, all devices together; default: as measured here.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=IN,OUT", help="Of a judge, in dollars per million tokens; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a recipe would take: runs, tokens, time, memory, disk, judge calls, dollars. Starts nothing."""
    from sweeps.detection import detectable_differences
    from sweeps.judge_cost import read_price
    from sweeps.outlook import Outlook
    from sweeps.planner import Evaluation, missing_datasets, plan_sweep

    loaded = _load(recipe, set_)
    prices = dict(read_price(text) for text in price or ())
    planned = None if missing_datasets(loaded) else plan_sweep(loaded)
    outlook = Outlook(loaded, planned, tokens_per_second, prices)
    detectable = detectable_differences(outlook.specs, Evaluation.load(loaded.eval))
    facts = {**outlook.facts(), "detectable_difference": detectable}
    if as_json:
        keys = {"run_keys": {run.run_key: run.name for run in planned.runs}} if planned else {}
        _print_json({**facts, **keys})
    else:
        _print_all(tables.plan(facts))


@app.command()
def power(
    recipe: RecipeArgument,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="SWEEP", help="A finished sweep to take the variances from; default: the field's."
        ),
    ] = None,
    difference: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="Points of alignment to detect; default: the recipe's margin, else 5."),
    ] = None,
    set_: SetOption = None,
    uri: UriOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what difference a recipe would find, and how many seeds, questions or samples a smaller one takes."""
    from emanalysis.power import POWER, assumed
    from emanalysis.power_table import smallest_change, ways_table
    from emanalysis.records import load
    from emanalysis.verdict import MARGIN
    from sweeps.detection import designs, noises
    from sweeps.planner import Evaluation
    from sweeps.recipe import expand
    from sweeps.store import data_directory

    loaded = _load(recipe, set_)
    target = difference or loaded.analysis.margin or MARGIN
    groups = designs(expand(loaded), Evaluation.load(loaded.eval))
    if not groups:
        raise ValueError(
            f"{loaded.name}: nothing is compared in its grid; it takes two configurations of one model and dataset"
        )
    finished = load(from_, tracking_uri=_uri(uri), cache=data_directory() / "records") if from_ else None
    try:
        measured = noises(list(groups), finished)
    except ValueError as error:
        raise ValueError(f"--from {from_}: {error}") from error
    found: list[dict[str, Any]] = []
    for (group, (design, alpha)), (noise, which) in zip(groups.items(), measured, strict=True):
        complete, guessed = assumed(noise)
        source = f"{from_} ({which})" if from_ else which
        found.append(
            {"compared": group.title, "configurations": design.cells, "variances": source, "assumed": guessed}
            | {"noise": asdict(complete), "ways": ways_table(complete, design, target, alpha=alpha)}
        )
    if as_json:
        _print_json({"sweep": loaded.name, "difference": target, "power": POWER, "comparisons": found})
        return
    for compared in found:
        out.print(tables.ways(compared))
        out.print(smallest_change(compared["ways"], target) + "\n", highlight=False)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; default: a Ray on this machine.")
    ] = None,
    report_: Annotated[bool, typer.Option("--report/--no-report", help="Write the report at the end.")] = True,
) -> None:
    """Run a sweep. Started again, it goes on where it was: finished runs are never repeated."""
    from sweeps.connection import Connection
    from sweeps.planner import plan_sweep
    from sweeps.recipe import kept_text, recipe_text

    loaded = _load(recipe, set_)
    planned = plan_sweep(loaded)
    if address is not None:
        from sweeps.cluster import check_address

        check_address(address)
    with Connection(address) as connection:
        failed = _execute(loaded, planned, text=kept_text(recipe_text(recipe), set_ or ()), connection=connection)
        if report_:
            from sweeps.stored import write_report

            _say_report(write_report(loaded.name, uri=_uri(loaded.tracking.uri)))
    if address is None:
        out.print(f"browse runs in MLflow:  [bold]{literal(_ui_command(loaded.tracking.uri))}[/]", highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def submit(
    recipe: Annotated[str | None, typer.Argument(metavar="R", help="As for `emsweep run`.")] = None,
    set_: SetOption = None,
    address: Annotated[
        str, typer.Option(help="Address of the cluster's Ray dashboard; default: the tunnel of `emsweep ui --cluster`.")
    ] = TUNNEL,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop this job instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job as JSON, and do not follow it.")] = False,
) -> None:
    """Send a sweep to a cluster and follow it. Ctrl-C ends the following, not the sweep.

    The same command again follows a sweep that is running, and goes on with one that was stopped.
    """
    from sweeps import submit as jobs

    if stop is not None:
        status = jobs.stop(jobs.connect(address), stop)
        if as_json:
            _print_json({"job": stop, "status": status})
        else:
            out.print(f"job {stop}: {status.lower()}")
        return
    if recipe is None:
        raise ValueError("say which recipe to submit (R), or which job to stop (--stop ID)")
    from sweeps.planner import plan_sweep
    from sweeps.recipe import recipe_text

    loaded = _load(recipe, set_)
    parcel = jobs.Parcel.pack(loaded, recipe_text(recipe), set_ or ())
    if not parcel.on_head:
        plan_sweep(loaded)  # mistakes are told here and not in a log on the head
    client = jobs.connect(address)
    job, started = jobs.submit(client, parcel)
    if as_json:
        _print_json({"job": job, "sweep": loaded.name, "started": started, "status": client.get_job_status(job)})
        return
    out.print(f"job [bold]{job}[/] {'is on its way' if started else 'is running already'}; its output follows")
    there = [] if address == TUNNEL else ["--address", address]
    overrides = [word for override in set_ or () for word in ("--set", override)]
    _follow(
        client,
        job,
        again=shlex.join(["emsweep", "submit", recipe, *overrides, *there]),
        end=shlex.join(["emsweep", "submit", "--stop", job, *there]),
    )


@app.command(name="verify-packing")
def verify_packing(
    recipe: RecipeArgument,
    set_: SetOption = None,
    runs: Annotated[int, typer.Option(min=1, help="How many of the recipe's runs, as unlike as possible.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train of each.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the runs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train some of a recipe's runs packed and alone on this machine, and compare them. Records nothing."""
    from sweeps.planner import examples, plan_sweep
    from sweeps.verify import varied, verify

    loaded = _load(recipe, set_)
    chosen = varied(examples(loaded, plan_sweep(loaded)), runs, seed=seed)
    if not as_json:
        out.print(f"training {len(chosen)} runs for {steps} steps, packed and each alone ...")
    verdicts = list(verify(chosen, steps=steps))
    if as_json:
        _print_json({"recipe": loaded.name, "runs": [verdict.facts() for verdict in verdicts]})
    else:
        _print_all(tables.verdicts(verdicts))
    if any(verdict.passed is False for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def status(sweep: SweepArgument, uri: UriOption = None, as_json: JsonOption = False) -> None:
    """Show how far a sweep has come."""
    from emtrain import names
    from emtrain.tracking import SweepLog

    runs = SweepLog.find(sweep, uri=_uri(uri)).runs()
    rows = [
        {
            "run": found.info.run_name,
            "run_key": run_key,
            "status": found.info.status,
            "heldout_loss": found.data.metrics.get(names.HELDOUT_LOSS),
            "aligned": found.data.metrics.get(names.eval_metric(names.ALIGNED)),
            "failure": found.data.tags.get(names.FAILURE) if found.info.status == "FAILED" else None,
            "stopped_early_by": found.data.tags.get(names.STOPPED) if found.info.status == "KILLED" else None,
        }
        for run_key, found in runs.items()
    ]
    counts = {state: sum(row["status"] == state for row in rows) for state in dict.fromkeys(r["status"] for r in rows)}
    if as_json:
        _print_json({"sweep": sweep, "counts": counts, "runs": rows})
        return
    _print_all(tables.status(sweep, counts, rows))


@app.command()
def report(
    sweep: SweepArgument,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write it.")] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="Points of alignment that would matter; default: what the recipe states."),
    ] = None,
    null_sweep: Annotated[
        str | None, typer.Option(metavar="NAME", help="One configuration, many seeds; default: what the recipe states.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Of several judges the one to go by; default: which the recipe names first."),
    ] = None,
    uri: UriOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a sweep's report: index.html, report.json and a CSV file behind each figure."""
    from sweeps.stored import write_report

    path = write_report(sweep, uri=_uri(uri), directory=output, margin=margin, null_sweep=null_sweep, judge=judge)
    if as_json:
        sys.stdout.write((path / "report.json").read_text())
    else:
        _say_report(path)


@app.command()
def judge(
    sweep: SweepArgument,
    judge_: Annotated[str, typer.Option("--judge", metavar="J", help="A judge's name; see `emsweep list judges`.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An argument of the judge (model=...).")
    ] = None,
    uri: UriOption = None,
) -> None:
    """Judge a sweep's stored responses with another judge, or what a judge could not be reached for. Needs no GPU."""
    from emtrain.tracking import SweepLog
    from sweeps.planner import Evaluation
    from sweeps.recipe import load_judge
    from sweeps.record import Setting
    from sweeps.rejudge import rejudge
    from sweeps.store import data_directory
    from sweeps.stored import stored_recipe

    address = _uri(uri)
    log = SweepLog.find(sweep, uri=address)
    spec = load_judge(judge_, overrides=set_ or ())
    (chosen,) = Setting(address, data_directory(), sweep).judges([spec])
    recipe = stored_recipe(log)
    question_sets = Evaluation.load(recipe.eval).question_sets if recipe else ()
    result = rejudge(log, chosen, question_sets, done=lambda name: out.print(f"judged  {literal(name)}"))
    kinds = ", ".join(f"{count} {kind}" for kind, count in result.missing.items())
    out.print(
        f"{result.judged} runs judged by {chosen.id}, {result.already} had been before, {result.unfinished} have no "
        f"stored responses; {sum(result.missing.values())} responses got no score"
        + (f" ({kinds}; their replies are in responses.parquet)" if kinds else ""),
        highlight=False,
    )


@app.command()
def geometry(
    sweep: SweepArgument,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs in each model and dataset.")] = 8,
    points: Annotated[int, typer.Option(min=3, help="Points of a line at which held-out loss is measured.")] = 11,
    alignment_points: Annotated[
        int, typer.Option(min=0, help="Points at which the sweep's questions are asked and judged; 0: none.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Draws the pairs that are chosen by chance.")] = 0,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; default: a Ray on this machine.")
    ] = None,
    uri: UriOption = None,
) -> None:
    """Measure whether runs are in different minima: loss and alignment between their adapters, angles, sharpness.

    Started again it measures only what is missing; the report shows what there is.
    """
    import numpy as np

    from emanalysis import records, run_pairs
    from emtrain.tracking import SweepLog
    from sweeps.planner import Evaluation
    from sweeps.record import Setting
    from sweeps.store import alone, data_directory
    from sweeps.stored import stored_recipe

    if alignment_points in (1, 2):
        raise ValueError(f"--alignment-points {alignment_points}: expected 0, or both ends and at least one between: 3")
    where = _uri(uri)
    log = SweepLog.find(sweep, uri=where)
    loaded = records.load(sweep, tracking_uri=where, cache=data_directory() / "records")
    for reason, runs in run_pairs.without_adapters(loaded.runs).groupby("reason")["name"]:
        shown = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
        err.print(f"[yellow]left out:[/] {literal(shown)}: {reason}", highlight=False)
    chosen = run_pairs.choose(loaded, per_group=pairs, seed=seed)
    recipe = stored_recipe(log)
    if chosen.empty or recipe is None:
        raise ValueError(
            f"{sweep}: nothing to measure; it takes two finished runs with adapters of one model and dataset"
        )
    evaluation = Evaluation.load(recipe.eval)
    setting = Setting(where, data_directory(), sweep)
    setting.judges(recipe.eval.judges)

    from sweeps import geometry as survey

    with alone(f"{sweep}-geometry"):
        kept = survey.load_tables(log)
        tasks = survey.outstanding(
            chosen,
            survey.places(log, chosen, evaluation),
            kept,
            losses_at=np.linspace(0, 1, points).round(6).tolist(),
            asked_at=np.linspace(0, 1, alignment_points).round(6).tolist(),
        )
        asked = sum(len(task.asked_at) for task in tasks if isinstance(task, survey.Line)) * evaluation.responses
        out.print(
            f"[bold]{sweep}[/]: {len(chosen)} pairs of runs, {len(tasks)} measurements to make, "
            f"{asked:,} responses to sample and judge",
            highlight=False,
        )
        failures = 0
        for count, (task, failure) in enumerate(
            survey.survey(log, setting, evaluation, tasks, kept, address=address), 1
        ):
            failures += failure is not None
            ending = f"  [red]failed:[/] {literal(failure)}" if failure else ""
            out.print(rf"\[{count}/{len(tasks)}] {literal(task.label)}{ending}", highlight=False)
    out.print(f"see it in the report:  [bold]emsweep report {literal(sweep)}[/]", highlight=False)
    if failures:
        raise typer.Exit(1)


@app.command(name="import-runs")
def import_runs_(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help="em-generalization, betley or table.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file, or a folder of them.")],
    sweep: Annotated[str, typer.Option("--sweep", metavar="NAME", help="The sweep they become; made if it is new.")],
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=COLUMN", help="For table: which column is what (heldout_loss=val_loss)."),
    ] = None,
    uri: UriOption = None,
) -> None:
    """Make a sweep of runs that others trained and published. Importing twice adds nothing."""
    from emanalysis.import_runs import read_published, record
    from emtrain.tracking import SweepLog
    from sweeps.recipe import check_name
    from sweeps.store import data_directory

    check_name(sweep, key="--sweep")
    for pair in map_ or ():
        if format_ != "table" or not all(pair.partition("=")):
            raise ValueError(f"--map {pair}: expected NAME=COLUMN, and the format table (here {format_})")
    columns = dict(pair.partition("=")[::2] for pair in map_ or ())
    published = read_published(format_, path, **({"columns": columns} if columns else {}))
    log = SweepLog.open(sweep, uri=_uri(uri), artifacts=data_directory() / "artifacts")
    done = record(published, format_, log=log)
    out.print(f"{sweep}: {len(done.added)} runs added, {len(done.known)} known before", highlight=False)
    for problem in done.malformed:
        err.print(f"[yellow]left out:[/] {literal(problem)}", highlight=False)


@app.command()
def ui(
    uri: UriOption = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Open a tunnel to the MLflow of this cluster instead."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
) -> None:
    """Open the MLflow web interface on the sweeps of this directory, or of a cluster."""
    from sweeps import tunnel

    if cluster is not None:
        from sweeps import cluster_env

        user = cluster_env.read()["MLFLOW_TRACKING_USERNAME"]
        command = tunnel.command(cluster, port=port)
        out.print(f"MLflow  http://localhost:{port}  user {user}, password in {cluster_env.PATH}", highlight=False)
        out.print(f"Ray     http://localhost:{tunnel.RAY_PORT}  token in the same file", highlight=False)
        out.print("Ctrl-C closes the tunnel")
        os.execvp(command[0], command)
    from emtrain.tracking import made, without_password

    address = _uri(uri)
    if not made(address):
        raise ValueError(f"there are no sweeps at {address} yet; `emsweep run` makes some, --uri names another store")
    if address.startswith(("http://", "https://")):
        out.print(f"the sweeps are on a server already: {literal(without_password(address))}", highlight=False)
        return
    if problem := tunnel.taken(port, host):  # MLflow would say so in a page of its own, and end as if all were well
        raise ValueError(
            f"--port {port}: nothing can listen there on {host} ({problem}); choose another --port or --host"
        )
    out.print(f"http://{host}:{port} shows {literal(without_password(address))}; Ctrl-C ends it", highlight=False)
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": address,  # not as an argument: everyone on the machine can read those
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that would serve nothing here
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, environment)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="schedules, datasets, models, ...")] = "",
    as_json: JsonOption = False,
) -> None:
    """List what a recipe can name: schedules, optimizers, datasets, models, questions, judges, analyses, recipes."""
    from sweeps.catalogue import KINDS, entries

    if not kind:
        raise ValueError(f"say what to list: {', '.join(KINDS)}")
    if kind not in KINDS:
        from emtrain.lookup import unknown

        raise ValueError(unknown("kind", kind, KINDS))
    found = entries(kind)
    if as_json:
        _print_json([{"name": entry.name, "summary": entry.summary} for entry in found])
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for entry in found:
        table.add_row(literal(entry.name), literal(entry.summary))
    out.print(table)


@app.command()
def doctor(uri: UriOption = None, as_json: JsonOption = False) -> None:
    """Check this machine: versions, devices, disk, caches, the MLflow store, keys."""
    from sweeps.doctor import examine
    from sweeps.store import data_directory

    findings = examine(_uri(uri), data_directory())
    if as_json:
        _print_json([finding.__dict__ for finding in findings])
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}
        for finding in findings:
            table.add_row(marks[finding.verdict], finding.what, literal(finding.detail))
        out.print(table)
    if any(finding.verdict == "bad" for finding in findings):
        raise typer.Exit(1)


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from sweeps.recipe import load_recipe, recipe_path, recipe_text

    return load_recipe(recipe_text(recipe), source=recipe_path(recipe).name, overrides=overrides or ())


def _execute(recipe: "Recipe", planned: "SweepPlan", *, text: str, connection: "Connection") -> int:
    """Run what is left of a sweep on the Ray of ``connection``; returns how many of its runs failed."""
    from emtrain import names
    from emtrain.tracking import SweepLog, tracking_uri
    from sweeps.agenda import Agenda, is_over
    from sweeps.planner import most_runs
    from sweeps.progress import Board, Display
    from sweeps.record import Setting
    from sweeps.store import alone, data_directory

    data = data_directory()
    uri = tracking_uri(recipe.tracking.uri, data)
    setting = Setting(uri, data, recipe.name, keep_weights=recipe.resources.keep_weights)
    setting.judges(recipe.eval.judges)  # a judge without its key stops here, before anything is written
    if recipe.analysis.null_sweep is not None:
        SweepLog.find(recipe.analysis.null_sweep, uri=uri)  # likewise a null sweep that is not there
    for former in recipe.search.warm_start if recipe.search else ():
        SweepLog.find(former, uri=uri)
    sweep = SweepLog.open(recipe.name, uri=uri, artifacts=data / "artifacts")
    with alone(recipe.name):
        agenda = Agenda.open(recipe, planned, sweep, data_dir=data)
        sweep.write_text(names.RECIPE, text)  # of a recipe that is another search than before, nothing is kept
        done = {key for key, found in agenda.known.items() if found.info.status == "FINISHED"}
        left = [run for run in planned.runs if run.run_key not in done]
        already = len(planned.runs) - len(left)
        stopped = [key for run in left if (key := run.run_key) in agenda.known and is_over(agenda.known[key])]
        counts = f"{len(planned.runs)} runs, {already} finished" + (
            f", {len(stopped)} stopped early" if stopped else ""
        )
        # Those of a search come up again one after the other; the board is to know that they are done.
        searched = {
            key: found.info.status == "FINISHED"
            for key, found in agenda.known.items()
            if recipe.search and found.data.tags.get(names.ROLE) in {"search", "confirm"} and is_over(found)
        }
        search = f", then a search of {recipe.search.trials} trials" if recipe.search else ""
        search += f", of which {len(searched)} runs are over" if searched else ""
        out.print(f"[bold]{recipe.name}[/]: {counts}{search}", highlight=False)
        if len(stopped) == len(left) and not recipe.search:
            sweep.set_status(sweep.parent_run_id, "FINISHED")
            return 0
        sweep.set_status(sweep.parent_run_id, "RUNNING")
        from sweeps import runner

        out.print("preparing models and starting workers ...")
        expected = sum(most_runs(recipe, len(planned.runs)).values())
        board = Board.of(left, already_done=already + sum(searched.values()), expected=expected)
        for run_key in stopped:
            board.runs[run_key].status = "KILLED"
        try:
            connection.open()
            with Display(out, board) as display:
                runner.execute(agenda, setting, connection=connection, display=display)
        except (runner.Interrupted, runner.HostDied, KeyboardInterrupt) as error:
            sweep.set_status(sweep.parent_run_id, "KILLED")
            why, code = (f"[red]error:[/] {error};", 1) if isinstance(error, runner.HostDied) else ("stopped:", 130)
            err.print(
                f"{why} {board.finished} of {board.total} runs are finished; the same command goes on from there",
                highlight=False,
            )
            raise typer.Exit(code) from None
        except (ValueError, OSError):  # a model or dataset that can't be made ready
            sweep.set_status(sweep.parent_run_id, "FAILED")
            raise
        board.expected = 0  # trials that wanted the same run were fewer runs
        failed, killed = board.count("FAILED"), board.count("KILLED")
        sweep.set_status(sweep.parent_run_id, "FAILED" if failed else "FINISHED")
        ended = f"{board.finished} of {board.total} runs finished" + (f", [red]{failed} failed[/]" if failed else "")
        ended += f", {killed} stopped early" if killed else ""
        out.print(ended, highlight=False)
        return failed


def _follow(client: "JobSubmissionClient", job: str, *, again: str, end: str) -> None:
    """Print what a job prints until it ends, then exit as it did. ``again`` and ``end`` are commands to tell of."""
    import asyncio

    from sweeps.submit import ending, follow

    async def show() -> None:
        async for text in follow(client, job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(show())
        ended = ending(client, job)
    except KeyboardInterrupt:
        err.print("\nthe sweep goes on without us")
        err.print(f"follow it again:  {literal(again)}")
        err.print(f"stop it:          {literal(end)}")
        return
    except ConnectionError as error:
        err.print(f"[red]lost the cluster:[/] {literal(str(error))}; the sweep goes on there")
        err.print(f"follow it again:  {literal(again)}")
        raise typer.Exit(1) from None
    out.print(f"job {job}: {ended.status.lower()}")
    if ended.status != "SUCCEEDED":
        raise typer.Exit(130 if ended.status == "STOPPED" else 1)


def _say_report(directory: Path) -> None:
    out.print(f"report:  [bold]{literal(str(directory / 'index.html'))}[/]", highlight=False)


def _uri(uri: str | None) -> str:
    from emtrain.tracking import tracking_uri
    from sweeps.store import data_directory

    return tracking_uri(uri, data_directory())


def _ui_command(uri: str | None) -> str:
    return f"emsweep ui --uri {uri}" if uri else "emsweep ui"


def _print_all(parts: Iterable[Table | str]) -> None:
    for part in parts:
        out.print(part, highlight=False)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
