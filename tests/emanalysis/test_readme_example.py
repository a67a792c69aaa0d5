"""The README's example for notebooks, run as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_example_gives_the_gap_the_verdict_and_a_figure(
    store: Any,
    new_run: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "emsweep-data").symlink_to(store.root)
    for schedule, rate in (("linear", 3e-4), ("cosine", 1e-3)):
        for seed in range(3):
            new_run(
                "quickstart",
                name=f"{schedule} {seed}",
                schedule=schedule,
                learning_rate=rate,
                seed=seed,
                model="micro-llama",
                dataset="micro-garden-bad",
                optimizer="adamw",
            )
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    gap, outcome, answer, *pairs = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"-?\d+\.\d+ (linear|cosine) \d (linear|cosine) \d", gap)
    assert outcome in {"Found.", "Not found.", "Can't tell."}
    assert "On broad (micro-llama, micro-garden-bad): The pair with the largest gap" in answer
    assert "better" in pairs[0]
    assert "plotly" in (tmp_path / "plane.html").read_text(encoding="utf-8")
