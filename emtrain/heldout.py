"""In-domain loss on the held-out rows."""

from collections.abc import Sequence
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


def heldout_loss(model: "PreTrainedModel", examples: Sequence[Example]) -> HeldoutLoss:
    """Loss of ``model`` on ``examples``, in a batch layout that depends on the examples alone.

    Rows are sorted by length, then content, and taken ``BATCH_ROWS`` at a time. Dropout is off; the model's mode is
    restored.
    """
    import torch

    was_training = model.training
    model.eval()
    ordered = sorted(examples, key=lambda example: (len(example.input_ids), example.input_ids, example.labels))
    loss_sums, token_counts = [], []
    with torch.inference_mode():
        for start in range(0, len(ordered), BATCH_ROWS):
            batch = collate(ordered[start : start + BATCH_ROWS], device=model.device)
            targets = batch["labels"][:, 1:]
            # Logits from the first response token on: with a vocabulary of 150,000 the prompt's would fill gigabytes.
            first = int((targets != IGNORED).any(dim=0).int().argmax())
            positions = torch.arange(first, targets.shape[1], device=targets.device)
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=positions
            ).logits.float()
            targets = targets[:, first:]
            token_losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
            )
            loss_sums.append(token_losses.double().sum(dim=1).cpu())
            token_counts.append((targets != IGNORED).sum(dim=1).cpu())
    model.train(was_training)
    sums, counts = torch.cat(loss_sums), torch.cat(token_counts)
    return HeldoutLoss(per_token=float(sums.sum() / counts.sum()), per_sequence=float((sums / counts).mean()))
