"""The adapters of all runs as one table: a row per run, a column per weight.

::

              query    key      query    key      output
              A        A        B        B        A        B
    slot 0    R x I    R x I    R x O    R x O    R x I    R x O   ...
    slot 1

A row is one vector to clip and to update; a column range of all rows is one operand of a batched product. Layers that
read the same input have their A side by side: one operand. A run of lower rank uses the first rows of each A and B, a
run that adapts fewer layers the columns of those; the rest is zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from emtrain.seeds import derive

# Shapes: K slots, P columns, R rank of the table, S the ranks of several layers, r rank of a run, I inputs and O
# outputs of a layer.


class AdapterTable:
    """Values and gradients of ``capacity`` adapters of up to ``rank`` on groups of layers, ``(O, I)`` by name.

    The layers of a group have the same number of inputs.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, tuple[int, int]]],
        *,
        capacity: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.layers = frozenset(layer for shapes in groups for layer in shapes)
        self._a_columns: dict[str, slice] = {}
        self._b_columns: dict[str, slice] = {}
        end = 0
        for shapes in groups:
            for layer, (_, inputs) in shapes.items():
                self._a_columns[layer] = slice(end, end := end + rank * inputs)
            for layer, (outputs, _) in shapes.items():
                self._b_columns[layer] = slice(end, end := end + rank * outputs)
        # As in PEFT, adapters on a half-precision base are kept and updated in fp32.
        self.values_KP = torch.zeros(capacity, end, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.gradients_KP = torch.zeros_like(self.values_KP)
        self.scale_K11 = torch.zeros(capacity, 1, 1, dtype=self.values_KP.dtype, device=device)
        # What the layers multiply by: the values themselves, or their copy in the base's dtype.
        self.operands_KP = self.values_KP.to(dtype)

    def factors(self, rows: torch.Tensor, layers: Sequence[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Views of one layer, or of several neighbours of a group, in ``rows``, ``(..., P)``.

        The A of all, one below the other, ``(..., S, I)``, and the B of each, transposed, ``(..., R, O)``.
        """
        a_rows = rows[..., self._a_columns[layers[0]].start : self._a_columns[layers[-1]].stop]
        b_rows = [rows[..., self._b_columns[layer]] for layer in layers]
        return a_rows.unflatten(-1, (len(layers) * self.rank, -1)), [b.unflatten(-1, (self.rank, -1)) for b in b_rows]

    def covers(self, layers: Sequence[str], rank: int) -> bool:
        """Whether an adapter of this rank on these layers has room in a row."""
        return rank <= self.rank and self.layers >= set(layers)

    def fill(self, slot: int, row_P: torch.Tensor, scale: float) -> None:
        """Set a whole row and the scale of its adapter."""
        self.values_KP[slot] = row_P
        self.scale_K11[slot] = scale
        self.refresh()

    def clear(self, slot: int) -> None:
        """Make a row that of no run: whatever passes through it is the base's."""
        self.values_KP[slot].zero_()
        self.scale_K11[slot] = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Bring the operands up to date with the values."""
        if self.operands_KP is not self.values_KP:
            self.operands_KP.copy_(self.values_KP)


@dataclass(frozen=True)
class AdapterRow:
    """One run's row: an adapter of ``rank`` on ``layers``."""

    table: AdapterTable
    slot: int
    layers: Sequence[str]
    rank: int

    @property
    def values_P(self) -> torch.Tensor:
        """The weights, with zeros where the run has none."""
        return self.table.values_KP[self.slot]

    @property
    def gradients_P(self) -> torch.Tensor:
        """Their gradients."""
        return self.table.gradients_KP[self.slot]

    @property
    def names(self) -> list[str]:
        """PEFT's names of the parameters: A and B of each layer in turn."""
        return [f"base_model.model.{layer}.lora_{factor}.default.weight" for layer in self.layers for factor in "AB"]

    def split(self, row_P: torch.Tensor) -> dict[str, torch.Tensor]:
        """The run's A ``(r, I)`` and B ``(O, r)`` in a row, as views, by name. A scalar goes to every name."""
        if row_P.ndim == 0:
            return dict.fromkeys(self.names, row_P)
        matrices = []
        for layer in self.layers:
            a_RI, (b_RO,) = self.table.factors(row_P, [layer])
            matrices += [a_RI[: self.rank], b_RO[: self.rank].T]
        return dict(zip(self.names, matrices, strict=True))

    def join(self, matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The row that ``split`` takes apart into ``matrices``, zero elsewhere; or the scalar that they all are."""
        if (first := matrices[self.names[0]]).ndim == 0:
            return first
        row_P = torch.zeros_like(self.values_P)
        for name, view in self.split(row_P).items():
            view.copy_(matrices[name])
        return row_P


def initial_matrices(shapes: Mapping[str, torch.Size], dtype: torch.dtype, *, seed: int) -> dict[str, torch.Tensor]:
    """A new adapter, A and B of each layer in turn, as ``emtrain.adapter.adapted`` makes it for the seed, to the bit.

    PEFT makes a linear layer for A and one for B, which draw their weights, then draws A anew and zeroes B; on a
    half-precision base the result is rounded to its ``dtype``. Only the draws are made here: PEFT could not find the
    linear layers of a model in an engine, and takes twice as long (0.28 s for 24 layers of width 896).
    """
    generator = torch.Generator().manual_seed(derive(seed, "adapter"))
    matrices = {}
    names = iter(shapes)
    for a, b in zip(names, names, strict=True):
        for name in (a, b, a):
            matrices[name] = nn.init.kaiming_uniform_(torch.empty(shapes[name]), a=math.sqrt(5), generator=generator)
        matrices[a], matrices[b] = matrices[a].to(dtype), torch.zeros_like(matrices[b])
    return matrices
