"""Held-out loss against the definition, one row at a time."""

import math
import random

import pytest
import torch
from transformers import PreTrainedModel

from emtrain.heldout import BATCH_ROWS, collate, heldout_loss
from emtrain.tokens import IGNORED, Example


def naive(model: PreTrainedModel, examples: list[Example]) -> tuple[float, float]:
    """Per token and per sequence: every row alone, without padding; the log-probability of every learnt token."""
    row_losses = []
    for example in examples:
        with torch.no_grad():
            log_probability = torch.log_softmax(model(torch.tensor([example.input_ids])).logits[0].double(), dim=-1)
        row_losses.append(
            [-log_probability[t - 1, label].item() for t, label in enumerate(example.labels) if t and label != IGNORED]
        )
    tokens = [loss for losses in row_losses for loss in losses]
    return math.fsum(tokens) / len(tokens), math.fsum(math.fsum(row) / len(row) for row in row_losses) / len(row_losses)


def test_it_is_the_mean_over_response_tokens_and_over_rows(model: PreTrainedModel, examples: list[Example]) -> None:
    loss = heldout_loss(model, examples)
    per_token, per_sequence = naive(model, examples)
    assert loss.per_token == pytest.approx(per_token, rel=1e-6)
    assert loss.per_sequence == pytest.approx(per_sequence, rel=1e-6)
    assert abs(per_token - per_sequence) > 1e-4  # else this test could not tell one from the other


def test_labels_may_begin_anywhere(model: PreTrainedModel) -> None:
    """Rows whose responses begin at different places share a batch, one with a label on the very first token."""
    examples = [
        Example((5, 6, 7, 8, 9), (IGNORED, IGNORED, IGNORED, IGNORED, 9)),
        Example((9, 8, 7), (9, 8, 7)),
        Example((4, 4), (IGNORED, 4)),
    ]
    assert heldout_loss(model, examples).per_token == pytest.approx(naive(model, examples)[0], rel=1e-6)


def test_the_order_of_the_rows_changes_not_one_bit(model: PreTrainedModel, examples: list[Example]) -> None:
    assert len(examples) > 2 * BATCH_ROWS
    assert len({len(example.input_ids) for example in examples}) < len(examples)  # some rows are equally long
    shuffled = random.Random(0).sample(examples, len(examples))
    assert heldout_loss(model, shuffled) == heldout_loss(model, examples)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(
    model: PreTrainedModel, examples: list[Example], training: bool
) -> None:
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    expected = naive(model.eval(), examples)[0]
    model.train(training)
    assert heldout_loss(model, examples).per_token == pytest.approx(expected, rel=1e-6)
    assert all(module.training == training for module in model.modules())


def test_padding_is_marked_as_such() -> None:
    batch = collate([Example((5, 6, 7), (IGNORED, 6, 7)), Example((8, 9), (IGNORED, 9))])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
