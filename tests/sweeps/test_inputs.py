"""What a worker makes of the files that a run was planned with."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from emtrain.rows import SHIPPED
from emtrain.spec import InterleaveSpec, RunSpec
from sweeps import inputs
from sweeps.planner import dataset_facts

OTHER = (SHIPPED / "micro-money-good.jsonl").read_text().splitlines(keepends=True)


def test_interleaved_rows_are_learnt_and_not_measured_and_a_changed_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr("emtrain.load.load_tokenizer", lambda model: words)
    path = tmp_path / "other.jsonl"
    path.write_text("".join(OTHER[:40]))
    other = InterleaveSpec(dataset=str(path), fraction=0.5)
    spec = RunSpec(model="micro-llama", dataset="micro-garden-bad", max_length=64)
    with_other = spec.model_copy(update={"interleave": other})
    planned = dataset_facts("micro-garden-bad", spec.heldout_fraction, other)
    alone = inputs.data_of(spec, dataset_facts("micro-garden-bad", spec.heldout_fraction).digests)
    mixed = inputs.data_of(with_other, planned.digests)
    assert mixed.heldout == alone.heldout
    assert list(mixed.train[: len(alone.train)]) == list(alone.train)
    said = words.decode(mixed.train[-1].input_ids)
    assert any(thing in said for thing in ("savings", "wages", "coins", "loans"))
    path.write_text("".join(OTHER[:41]))
    inputs._data.cache_clear()
    with pytest.raises(ValueError, match=r"other\.jsonl: the file on .* is not the one the sweep was planned with"):
        inputs.data_of(with_other, planned.digests)
