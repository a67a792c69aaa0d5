"""In-domain loss on the held-out rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emtrain.tokens import IGNORED, Example

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_ROWS = 16
"""Rows per forward pass. Part of the definition: another layout changes the last bits of the loss."""


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean negative log-likelihood of the held-out response tokens, in nats."""

    per_token: float
    """Mean over all response tokens."""
    per_sequence: float
    """Mean over rows of each row's mean over its response tokens."""


def collate(examples: Sequence[Example], *, device: "torch.device | str" = "cpu") -> dict[str, "torch.Tensor"]:
    """Rows padded on the right: ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``.

    Padding is token 0 with attention 0 and no label, so its id is of no account.
    """
    import torch

    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros((len(examples), width), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batches(
    examples: Sequence[Example], *, rows: int = BATCH_ROWS, device: "torch.device | str" = "cpu"
) -> Iterator[dict[str, "torch.Tensor"]]:
    """``examples`` sorted by length, then content, so many ``rows`` at a time."""
    ordered = sorted(examples, key=lambda example: (len(example.input_ids), example.input_ids, example.labels))
    for start in range(0, len(ordered), rows):
        yield collate(ordered[start : start + rows], device=device)


def token_losses(model: "PreTrainedModel", batch: dict[str, "torch.Tensor"]) -> "torch.Tensor":
    """Negative log-likelihood of a batch's tokens from the first labelled one on, 0 where there is no label."""
    import torch

    targets = batch["labels"][:, 1:]
    # Logits from the first response token on: with a vocabulary of 150,000 the prompt's would fill gigabytes.
    first = int((targets != IGNORED).any(dim=0).int().argmax())
    positions = torch.arange(first, targets.shape[1], device=targets.device)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=positions
    ).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets[:, first:], ignore_index=IGNORED, reduction="none"
    )


def row_losses(model: "PreTrainedModel", examples: Sequence[Example]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Sum of the losses of each row's response tokens, and their number, in the order of ``batches``.

    Dropout is off; the model's mode is restored.
    """
    import torch

    was_training = model.training
    model.eval()
    sums, counts = [], []
    with torch.inference_mode():
        for batch in batches(examples, device=model.device):
            sums.append(token_losses(model, batch).double().sum(dim=1).cpu())
            counts.append((batch["labels"][:, 1:] != IGNORED).sum(dim=1).cpu())
    model.train(was_training)
    return torch.cat(sums), torch.cat(counts)


def heldout_loss(model: "PreTrainedModel", examples: Sequence[Example]) -> HeldoutLoss:
    """Loss of ``model`` on ``examples``, in a batch layout that depends on the examples alone."""
    sums, counts = row_losses(model, examples)
    return HeldoutLoss(per_token=float(sums.sum() / counts.sum()), per_sequence=float((sums / counts).mean()))
