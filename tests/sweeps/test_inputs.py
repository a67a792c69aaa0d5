"""What a worker makes of the files that a run was planned with."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from emeval.spec import EvalSpec
from emtrain.revision import Unavailable
from emtrain.rows import SHIPPED
from emtrain.spec import InterleaveSpec, RunSpec
from sweeps import inputs
from sweeps.content import keep_datasets
from sweeps.planner import Evaluation, dataset_facts, plan_run

OTHER = (SHIPPED / "micro-money-good.jsonl").read_text().splitlines(keepends=True)


def test_interleaved_rows_are_learnt_and_not_measured_also_where_the_file_is_another_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(inputs, "fetch", lambda model, revision: None)
    monkeypatch.setattr("emtrain.load.load_tokenizer", lambda model, revision: words)
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))
    where: dict[str, Any] = {"revision": None, "data_dir": tmp_path / "shared"}
    path = tmp_path / "other.jsonl"
    path.write_text("".join(OTHER[:40]))
    other = InterleaveSpec(dataset=str(path), fraction=0.5)
    spec = RunSpec(model="micro-llama", dataset="micro-garden-bad", max_length=64)
    with_other = spec.model_copy(update={"interleave": other})
    planned = dataset_facts("micro-garden-bad", spec.heldout_fraction, other)
    evaluation = Evaluation.load(EvalSpec(questions=("micro-broad",), samples=1, judges=("micro-rule",)))
    keep_datasets([plan_run(with_other, evaluation, name="")], tmp_path / "shared")
    alone = inputs.data_of(spec, dataset_facts("micro-garden-bad", spec.heldout_fraction).digests, **where)
    mixed = inputs.data_of(with_other, planned.digests, **where)
    assert mixed.heldout == alone.heldout
    assert list(mixed.train[: len(alone.train)]) == list(alone.train)
    said = words.decode(mixed.train[-1].input_ids)
    assert any(thing in said for thing in ("savings", "wages", "coins", "loans"))
    path.write_text("".join(OTHER[:41]))
    inputs._data.cache_clear()
    assert inputs.data_of(with_other, planned.digests, **where) == mixed
    (copied,) = (tmp_path / "cache").rglob("*.jsonl")
    copied.write_text("".join(OTHER[:41]))
    inputs._data.cache_clear()
    with pytest.raises(ValueError, match=r"rows\.jsonl on .* has been changed; delete it where it is a copy"):
        inputs.data_of(with_other, planned.digests, **where)


@pytest.mark.parametrize(("promised", "refused"), [("1", True), ("-1", False), ("", False)])
def test_a_process_that_was_given_a_gpu_does_not_train_without_it(
    promised: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("emtrain.load.load_model", lambda *given, **more: "a model")
    monkeypatch.setattr("emtrain.load.load_tokenizer", lambda *given, **more: "its tokenizer")
    monkeypatch.setattr(inputs, "fetch", lambda model, revision: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", promised)
    inputs.base_model.cache_clear()
    expected = pytest.raises(Unavailable, match="CUDA_VISIBLE_DEVICES is 1 on") if refused else nullcontext()
    with expected:
        assert inputs.base_model("micro-llama", "auto", None) == ("a model", "its tokenizer")
    inputs.base_model.cache_clear()
