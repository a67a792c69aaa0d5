"""Weight updates of low rank, as LoRA adapters stand for them: sizes, angles and sums, without building a full matrix.

An adapter adds ``scale * B A`` to the weight of each layer it adapts. Here that is a ``LowRank`` with the scale in its
left factor, so that two adapters of unlike rank or scale are compared, and added, as what they do to the weights.
Everything is computed in double precision, whatever the factors are kept in.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

NEGLIGIBLE = 1e-6
"""Singular values below this share of a layer's largest are rounding, which fp32 factors leave at about 1e-7."""
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Settings of PEFT under which an adapter is more than one ``scale * B A`` a layer."""

# Shapes: O outputs and I inputs of a layer, r rank of an update, k <= r singular values that are not negligible.


@dataclass(frozen=True)
class LowRank:
    """The ``(O, I)`` matrix ``left @ right`` with ``left`` ``(O, r)`` and ``right`` ``(r, I)``."""

    left: torch.Tensor
    right: torch.Tensor

    @cached_property
    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Thin singular value decomposition: columns ``(O, k)``, values ``(k,)`` descending, rows ``(I, k)``."""
        columns, upper = torch.linalg.qr(self.left.double())
        rows, lower = torch.linalg.qr(self.right.double().T)
        u, values, vh = torch.linalg.svd(upper @ lower.T)
        kept = values > NEGLIGIBLE * values.max()
        return columns @ u[:, kept], values[kept], rows @ vh.T[:, kept]


Update = Mapping[str, LowRank]
"""An update by layer, named as in the base model. A layer that is not in it is not changed."""


def load_update(directory: Path, *, device: torch.device | str = "cpu") -> Update:
    """The update of an adapter in PEFT's format.

    Raises ``ValueError`` when the adapter is of another kind than LoRA, or holds more than its factors.
    """
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA":
        raise ValueError(f"adapter {directory}: peft_type is {config['peft_type']}, expected LORA")
    if given := [key for key in UNSUPPORTED if config.get(key)]:
        raise ValueError(f"adapter {directory}: {given[0]} is {config[given[0]]!r}; only plain LoRA can be compared")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    tensors = load_file(directory / "adapter_model.safetensors", device=str(device))
    suffix = ".lora_A.weight"
    layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    if len(tensors) != 2 * len(layers):
        raise ValueError(f"adapter {directory}: it holds more than pairs of lora_A and lora_B; expected plain LoRA")
    return {
        layer.removeprefix("base_model.model."): LowRank(
            scale * tensors[f"{layer}.lora_B.weight"].float(), tensors[f"{layer}{suffix}"].float()
        )
        for layer in layers
    }


def combine(parts: Sequence[tuple[float, Update]]) -> Update:
    """The sum of updates, each times its weight: exactly a LoRA whose rank is the sum of theirs."""
    layers = dict.fromkeys(layer for _, update in parts for layer in update)
    return {
        layer: LowRank(
            torch.cat([weight * update[layer].left for weight, update in parts if layer in update], dim=1),
            torch.cat([update[layer].right for _, update in parts if layer in update], dim=0),
        )
        for layer in layers
    }


def inner(a: Update, b: Update) -> float:
    """Frobenius inner product over all layers, through ``(r, r)`` products of the factors."""
    total = 0.0
    for layer in a.keys() & b.keys():
        lefts = b[layer].left.double().T @ a[layer].left.double()
        rights = b[layer].right.double() @ a[layer].right.double().T
        total += float((lefts * rights).sum())
    return total


def norm(update: Update) -> float:
    """Frobenius norm over all layers."""
    return math.sqrt(max(inner(update, update), 0.0))


def cosine(a: Update, b: Update) -> float:
    """Cosine of the angle between two updates, each taken as one long vector; NaN when one is zero."""
    size = norm(a) * norm(b)
    return max(-1.0, min(1.0, inner(a, b) / size)) if size else math.nan


def angle(a: Update, b: Update) -> float:
    """Angle between two updates in degrees, 0 to 180; NaN when one is zero."""
    return math.degrees(math.acos(cosine(a, b)))


def stable_rank(update: Update) -> float:
    """Mean over changed layers of ``|dW|_F^2 / |dW|_2^2``, 1 to r (Rudelson & Vershynin 2007); NaN without any."""
    ranks = [float((values / values[0]).square().sum()) for _, values, _ in _spectra(update) if len(values)]
    return sum(ranks) / len(ranks) if ranks else math.nan


def _spectra(update: Update) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [layer.svd for layer in update.values()]


@dataclass(frozen=True)
class Subspaces:
    """How the column (output) spaces, or the row (input) spaces, of two updates lie: means over shared layers."""

    overlap: float
    """Mean squared cosine of the principal angles: 1 where one space holds the other."""
    by_chance: float
    """The overlap expected of random spaces of the same dimensions: the larger one over that of the layer."""
    angle: float
    """Mean principal angle in degrees."""


def principal_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosines of the principal angles between two spaces, descending, from orthonormal bases ``(n, k)``.

    Bjorck & Golub (1973). As many as the smaller space has dimensions.
    """
    return torch.linalg.svdvals(a.T @ b).clamp(max=1.0)


def subspaces(a: Update, b: Update) -> tuple[Subspaces, Subspaces] | None:
    """Column spaces and row spaces of two updates; None when they change no layer in common."""
    rows = []
    for layer in a.keys() & b.keys():
        (columns_a, _, rows_a), (columns_b, _, rows_b) = a[layer].svd, b[layer].svd
        if columns_a.shape[1] and columns_b.shape[1]:
            rows.append((_measured(columns_a, columns_b), _measured(rows_a, rows_b)))
    if not rows:
        return None
    means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    return Subspaces(*means[0]), Subspaces(*means[1])


def _measured(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    cosines = principal_cosines(a, b)
    by_chance = max(a.shape[1], b.shape[1]) / a.shape[0]
    return float(cosines.square().mean()), by_chance, math.degrees(float(cosines.acos().mean()))
