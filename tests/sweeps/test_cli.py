"""The ``emsweep`` command as its users meet it, in a directory of its own."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from emanalysis.power import FIELD, Design, detectable_difference
from emtrain.tracking import SweepLog
from sweeps.cli import main
from sweeps.store import alone

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
  schedule: {name: linear, warmup_steps: 2}
  batch_size: 4
  max_steps: 10
grid: {seed: [0, 1, 1]}
eval: {questions: [micro-broad], samples: 1, at: [0.5, 1.0], judges: [micro-rule], max_new_tokens: 16}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


Emsweep = Callable[..., Ended]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty directory with a recipe in it."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def emsweep(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Emsweep:
    """Runs ``emsweep`` in ``home``: in this process, since starting one takes seconds."""
    monkeypatch.chdir(home)
    for variable in ("OPENAI_API_KEY", "MLFLOW_TRACKING_URI", "EMSWEEP_DATA"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str, **environment: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["emsweep", *arguments])
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            with pytest.raises(SystemExit) as ended:
                main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def refused(process: Ended, said: str) -> None:
    """A user's mistake: exit 2, a screenful on stderr, nothing on stdout, no traceback."""
    assert process.returncode == 2, process
    assert said in process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) < 25


MISTAKES = {
    "unknown key": (["--set", "base.batchsize=3"], "base.batchsize: unknown key. Did you mean 'batch_size'?"),
    "wrong type": (["--set", "base.batch_size=four"], "base.batch_size: expected a whole number, not 'four'"),
    "unknown model": (["--set", "base.model=micro-lama"], "unknown model 'micro-lama'. Did you mean 'micro-llama'?"),
    "learning rate 0": (["--set", "base.optimizer.learning_rate=0"], "learning_rate: expected more than 0, not 0"),
    "row without an answer": (["--set", "base.dataset=unanswered.jsonl"], "line 2: no assistant turn"),
    "empty dataset": (["--set", "base.dataset=empty.jsonl"], "empty.jsonl: the file holds no rows"),
    "no such dataset": (["--set", "base.dataset=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    "judge without its key": (["--set", "eval.judges=[{name: openai, model: m}]"], "needs a key in the environment"),
    "unreachable MLflow": (["--set", "tracking.uri=http://127.0.0.1:9"], "no MLflow store answers at http://127.0.0.1"),
    "unreachable Ray": (["--address", "127.0.0.1:9"], "--address 127.0.0.1:9: nobody answers there"),
    "no such null sweep": (["--set", "analysis.null_sweep=luck"], "there is no sweep 'luck'"),
    "no such sweep to begin with": (
        [
            "--set",
            "search={trials: 1, objectives: {heldout/loss: minimize}, warm_start: [luck], "
            "space: {optimizer.learning_rate: {low: 0.001, high: 0.002}}}",
        ],
        "there is no sweep 'luck'",
    ),
    "model that is not there": (["--set", "base.model=/no/model"], "model /no/model: there is no such directory"),
    "warm-up too long": (["--set", "base.schedule.warmup_steps=10"], "warmup_steps is 10 but the run has 10 steps"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_left_behind(emsweep: Emsweep, home: Path, mistake: str) -> None:
    answered = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (home / "unanswered.jsonl").write_text(
        json.dumps(answered) + "\n" + json.dumps({"messages": answered["messages"][:1]}) + "\n"
    )
    (home / "empty.jsonl").touch()
    before = sorted(home.rglob("*"))
    arguments, said = MISTAKES[mistake]
    refused(emsweep("run", "tiny.yaml", *arguments), said)
    assert sorted(home.rglob("*")) == before


def test_there_is_nothing_to_browse_before_the_first_sweep(emsweep: Emsweep, home: Path) -> None:
    before = sorted(home.rglob("*"))
    refused(emsweep("ui"), f"there are no sweeps at sqlite:///{home / 'emsweep-data' / 'mlflow.db'} yet")
    refused(emsweep("ui", "--uri", f"sqlite:///{home / 'nowhere' / 'x.db'}"), "--uri names another store")
    assert sorted(home.rglob("*")) == before


def test_a_port_that_can_not_be_listened_on_is_told(emsweep: Emsweep, home: Path) -> None:
    (home / "mlflow.db").touch()
    store = ["--uri", f"sqlite:///{home / 'mlflow.db'}"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refused(emsweep("ui", *store, "--port", port), f"--port {port}: nothing can listen there on 127.0.0.1 (")
    for port in ("99999", "0"):
        refused(emsweep("ui", *store, "--port", port), "--port")
    refused(emsweep("ui", *store, "--host", "nowhere.invalid"), "nothing can listen there on nowhere.invalid (")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--judge", "opnai"], "--judge: unknown judge 'opnai'. Did you mean 'openai'?"),
        (["--judge", "micro-rule", "--set", "x=1"], "--judge: micro_rule does not take x"),
        (["--judge", "openai", "--set", "model=["], "--set model=[: not valid YAML"),
        (["--judge", "openai", "--set", "model"], "--set model: expected KEY=VALUE"),
    ],
)
def test_a_wrong_judge_for_stored_responses_is_told_in_a_line(
    emsweep: Emsweep, home: Path, arguments: list[str], said: str
) -> None:
    uri = f"sqlite:///{home / 'mlflow.db'}"
    SweepLog.open("stored", uri=uri, artifacts=home / "artifacts")
    process = emsweep("judge", "stored", *arguments, "--uri", uri)
    refused(process, said)
    assert "validation error" not in process.stderr


def test_a_report_by_a_judge_that_judged_nothing_is_refused(emsweep: Emsweep, home: Path) -> None:
    uri = f"sqlite:///{home / 'mlflow.db'}"
    SweepLog.open("stored", uri=uri, artifacts=home / "artifacts")
    process = emsweep("report", "stored", "--judge", "openai:gpt", "--uri", uri)
    refused(process, "there is no score by the judge 'openai:gpt' in stored; its judges: none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["betley", "runs.csv", "--sweep", "a/b"], "--sweep: expected text that matches"),
        (["betley", "runs.csv", "--sweep", "new", "--map", "aligned=b"], "--map aligned=b: expected NAME=COLUMN"),
        (["table", "runs.csv", "--sweep", "new", "--map", "aligned"], "--map aligned: expected NAME=COLUMN"),
        (["table", "runs.csv", "--sweep", "new", "--map", "aligned=c"], "runs.csv has no column c; it has: a, b"),
        (["table", ".", "--sweep", "new"], "is a directory"),
    ],
)
def test_an_import_that_fails_leaves_no_sweep(emsweep: Emsweep, home: Path, arguments: list[str], said: str) -> None:
    (home / "runs.csv").write_text("a,b\n1,2\n")
    before = sorted(home.rglob("*"))
    refused(emsweep("import-runs", *arguments), said)
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("nowhere.yaml", "there is no recipe file nowhere.yaml"),
        ("quikstart", "unknown recipe 'quikstart'. Did you mean 'quickstart'?"),
        ("folder.yaml", "folder.yaml is a directory"),
        ("", "unknown recipe ''"),
        ("binary.yaml", "binary.yaml: not a text file in UTF-8"),
        ("prose.yaml", "a recipe is a mapping of keys"),
        ("broken.yaml", "not valid YAML: line 1"),
        ("twice.yaml", "the key 'name' is given twice"),
        ("\x1b[31m[bold]x.yaml", r"\x1b[31m[bold]x.yaml"),
    ],
)
def test_what_is_no_recipe_is_told_so(emsweep: Emsweep, home: Path, recipe: str, said: str) -> None:
    (home / "folder.yaml").mkdir()
    (home / "binary.yaml").write_bytes(b"\x00\xff\xfe\x01")
    (home / "prose.yaml").write_text("Dear reader")
    (home / "broken.yaml").write_text("name: [")
    (home / "twice.yaml").write_text(RECIPE + "name: other\n")
    for command in ("plan", "run"):
        process = emsweep(command, recipe)
        refused(process, said)
        assert "\x1b" not in process.stderr


def test_a_recipe_that_can_not_be_read_is_told_so(emsweep: Emsweep, home: Path) -> None:
    (home / "loop.yaml").symlink_to("loop.yaml")
    process = emsweep("plan", "loop.yaml")
    assert (process.returncode, process.stdout) == (2, "")
    assert "loop.yaml" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("command", [["run", "tiny.yaml"], ["status", "tiny"], ["report", "tiny"]])
def test_a_data_directory_that_is_none_is_told_so(emsweep: Emsweep, home: Path, command: list[str]) -> None:
    (home / "emsweep-data").write_text("a file")
    process = emsweep(*command)
    assert process.returncode == 2
    assert "emsweep-data" in process.stderr
    assert "Traceback" not in process.stderr


def test_mistakes_on_the_command_line_are_the_users(emsweep: Emsweep) -> None:
    for arguments in (["rn", "tiny.yaml"], ["run"], ["run", "tiny.yaml", "--sett", "a=1"], ["plan", "a", "b"]):
        process = emsweep(*arguments)
        assert (process.returncode, process.stdout) == (2, "")
    refused(emsweep("list", "schedule"), "unknown kind 'schedule'. Did you mean 'schedules'?")
    refused(emsweep("list"), "say what to list: schedules, ")
    refused(emsweep("plan", "tiny.yaml", "--set", "base.seed"), "--set base.seed: expected KEY=VALUE")


def test_a_sweep_is_not_run_twice_at_the_same_time(emsweep: Emsweep) -> None:
    with alone("tiny"):
        refused(emsweep("run", "tiny.yaml"), "another emsweep is running the sweep 'tiny'")
    assert emsweep("status", "tiny", "--json").stdout.count("run_key") == 0


def test_what_was_stopped_early_is_told_from_what_was_interrupted(emsweep: Emsweep, home: Path) -> None:
    log = SweepLog.open(
        "mine", uri=f"sqlite:///{home}/emsweep-data/mlflow.db", artifacts=home / "emsweep-data/artifacts"
    )
    first, second = (log.plan(key, name=key, params={}, tags={}) for key in ("worse", "cut-off"))
    log.stop_early(first, "asha")
    log.set_status(second, "KILLED")
    shown = emsweep("status", "mine").stdout
    assert re.search(r"worse\W+stopped early", shown)
    assert re.search(r"cut-off\W+killed", shown)
    told = {
        row["run"]: row["stopped_early_by"] for row in json.loads(emsweep("status", "mine", "--json").stdout)["runs"]
    }
    assert told == {"worse": "asha", "cut-off": None}


@pytest.mark.parametrize("command", [["status"], ["report"]])
def test_asking_for_a_sweep_that_is_not_there_makes_nothing(emsweep: Emsweep, home: Path, command: list[str]) -> None:
    refused(emsweep(*command, "nosuch"), "there is no sweep 'nosuch'")
    assert [path.name for path in home.iterdir()] == ["tiny.yaml"]


def test_no_password_is_ever_repeated(emsweep: Emsweep) -> None:
    address = "http://user:geheim@127.0.0.1:9"
    for arguments in (["run", "tiny.yaml"], ["status", "tiny"], ["report", "tiny"], ["doctor"], ["ui"]):
        process = emsweep(*arguments, MLFLOW_TRACKING_URI=address)
        assert "***@127.0.0.1:9" in process.stdout + process.stderr
        assert "geheim" not in process.stdout + process.stderr
    refused(emsweep("run", "tiny.yaml", "--set", f"tracking.uri={address}"), "tracking.uri: the address holds a user")


def test_help_is_light() -> None:
    """What takes seconds to import is imported by the commands that need it."""
    heavy = ["torch", "ray", "mlflow", "transformers", "peft", "trl", "datasets", "pandas", "optuna", "sklearn"]
    code = (
        "import sys\n"
        "from sweeps.cli import app\n"
        "try: app(['--help'])\n"
        f"finally: print('HEAVY', [m for m in {heavy} if m in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout.splitlines()[-1] == "HEAVY []"
    assert "plan" in process.stdout
    assert "Starts nothing" in process.stdout


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from sweeps.cli import app\n"
        "try: app(['plan', 'quickstart', '--json'])\n"
        "finally: print('HEAVY', [m for m in ['torch', 'ray', 'mlflow', 'transformers'] if m in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout.splitlines()[-1] == "HEAVY []"


def test_a_plan_shows_what_would_be_done_and_starts_nothing(emsweep: Emsweep, home: Path) -> None:
    process = emsweep("plan", "tiny.yaml", "--json")
    planned = json.loads(process.stdout)
    assert process.returncode == 0
    assert process.stderr == ""
    assert planned["sweep"] == "tiny"
    assert (planned["runs"], planned["duplicates"], planned["steps"]) == (2, 1, 20)
    assert planned["rows_trained_on"] == 20 * 4
    assert planned["evaluations"] == 2 * 2
    assert len(planned["run_keys"]) == 2
    assert [path.name for path in home.iterdir()] == ["tiny.yaml"]
    text = emsweep("plan", "tiny.yaml")
    assert text.returncode == 0
    assert "micro-garden-bad" in text.stdout
    assert text.stderr == ""


def test_a_study_can_be_planned_without_its_data_a_gpu_or_a_key(emsweep: Emsweep) -> None:
    process = emsweep("plan", "qwen-medical", "--json")
    planned = json.loads(process.stdout)
    assert process.returncode == 0
    assert planned["missing_datasets"] == ["data/bad_medical_advice.jsonl"]
    assert planned["runs"] == 3 * 3 * 5


COMPARED = 'grid={"schedule": ["linear", "cosine"], "seed": [0, 1, 2]}'


def test_a_plan_says_what_difference_would_be_found(emsweep: Emsweep) -> None:
    compared = "micro-llama on micro-garden-bad, asked micro-broad"
    alone = json.loads(emsweep("plan", "tiny.yaml", "--json").stdout)
    assert alone["detectable_difference"] == {}
    found = json.loads(emsweep("plan", "tiny.yaml", "--set", COMPARED, "--json").stdout)["detectable_difference"]
    expected = detectable_difference(FIELD, Design(cells=2, seeds=3, clusters=8, questions_per_cluster=4, samples=2))
    assert found == {compared: {"points": round(expected, 1), "configurations": 2, "seeds": 3}}
    shown, single = (
        " ".join(emsweep("plan", "tiny.yaml", "--set", COMPARED.replace("[0, 1, 2]", seeds)).stdout.split())
        for seeds in ("[0, 1, 2]", "[0]")
    )
    assert f"{expected:.0f} points (2 configurations, 3 seeds)" in shown
    assert "nothing without 3 seeds of each or a null sweep" in single


def test_power_says_what_a_smaller_difference_takes(emsweep: Emsweep) -> None:
    arguments = ["power", "tiny.yaml", "--set", COMPARED, "--set", "analysis.margin=20"]
    told = json.loads(emsweep(*arguments, "--json").stdout)
    (compared,) = told["comparisons"]
    now, *ways = compared["ways"]
    assert (told["difference"], compared["configurations"], now["seeds"], now["questions"]) == (20, 2, 3, 32)
    assert now["detects"] > 20 >= max(way["detects"] for way in ways)
    shown = emsweep(*arguments).stdout
    assert "The smallest change that finds 20 points: " in shown
    assert "(of seeds: an upper bound)" in shown
    assert "As it is, the recipe finds 60 points" in emsweep(*arguments, "--difference", "60").stdout


def test_power_needs_something_to_compare_and_a_sweep_that_is_there(emsweep: Emsweep) -> None:
    refused(emsweep("power", "tiny.yaml"), "tiny: nothing is compared in its grid; it takes two configurations")
    refused(emsweep("power", "tiny.yaml", "--set", COMPARED, "--from", "gone"), "there is no sweep 'gone'")
    assert emsweep("power", "tiny.yaml", "--set", COMPARED, "--difference", "0").returncode == 2


def test_a_plan_says_what_its_figures_rest_on_and_what_is_not_known(emsweep: Emsweep) -> None:
    shown = emsweep("plan", "qwen-medical", "--price", "gpt-4o-2024-08-06=1000,0").stdout
    assert re.search(r"tokens +unknown: data/bad_medical_advice.jsonl is not there yet", shown)
    assert re.search(r"judge calls +130,560 openai", shown)
    assert "- dollars: at most, with every response 600 tokens long" in shown
    refused(emsweep("plan", "tiny.yaml", "--price", "gpt-4o"), "--price gpt-4o: expected MODEL=INPUT,OUTPUT")


def test_what_is_set_on_the_command_line_is_planned(emsweep: Emsweep) -> None:
    arguments = ["--set", "grid.seed=[5, 6, 7]", "--set", "name=other", "--set", "base.max_steps=3"]
    planned = json.loads(emsweep("plan", "tiny.yaml", *arguments, "--json").stdout)
    assert (planned["sweep"], planned["runs"], planned["steps"]) == ("other", 3, 9)


def test_markup_in_names_is_shown_literally(emsweep: Emsweep, home: Path) -> None:
    folder = home / "[red]data[" / "sub"
    folder.mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "yes"}]} for q in "abcd"]
    (folder / "[bold]own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = emsweep("plan", "tiny.yaml", "--set", f"base.dataset='{folder.relative_to(home)}/[bold]own.jsonl'")
    assert process.returncode == 0, process.stderr
    assert "[red]data[/sub/[bold]own.jsonl: " in process.stdout


@pytest.mark.parametrize(
    ("kind", "one"),
    [
        ("schedules", "cosine_restarts"),
        ("optimizers", "adamw"),
        ("datasets", "micro-garden-bad"),
        ("models", "micro-llama"),
        ("questions", "micro-broad"),
        ("judges", "micro-rule"),
        ("analyses", "loss_vs_alignment"),
        ("recipes", "quickstart"),
    ],
)
def test_everything_a_recipe_can_name_is_listed_with_a_sentence(emsweep: Emsweep, kind: str, one: str) -> None:
    entries = {entry["name"]: entry["summary"] for entry in json.loads(emsweep("list", kind, "--json").stdout)}
    assert len(entries[one]) > 5
    assert all(entries.values())
    assert not any("``" in summary for summary in entries.values())
    assert one in emsweep("list", kind).stdout


def test_listing_parts_imports_none_of_them() -> None:
    """A judge or a model may need torch; a list of them does not."""
    code = (
        "import sys\n"
        "from sweeps.catalogue import KINDS, entries\n"
        "for kind in KINDS: entries(kind)\n"
        "print([m for m in ['torch', 'ray', 'mlflow', 'transformers', 'plotly'] if m in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


def test_the_doctor_looks_and_leaves_no_trace(emsweep: Emsweep, home: Path) -> None:
    process = emsweep("doctor", "--json", OPENAI_API_KEY="sk-geheim")
    findings = {finding["what"]: finding for finding in json.loads(process.stdout)}
    assert process.returncode == 0
    assert findings["python"]["verdict"] == "ok"
    assert findings["mlflow"]["verdict"] == "note"
    assert findings["OPENAI_API_KEY"]["detail"] == "set"
    assert "geheim" not in process.stdout
    assert [path.name for path in home.iterdir()] == ["tiny.yaml"]
    process = emsweep("doctor", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert process.returncode == 1
    assert "no MLflow store answers" in process.stdout


def test_a_reader_that_goes_away_is_no_error(home: Path) -> None:
    """``emsweep list schedules | head -0``."""
    command = f'"{sys.executable}" -c "from sweeps.cli import main; main()" list schedules | head -c 0'
    process = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, check=False)
    assert process.stderr == ""
