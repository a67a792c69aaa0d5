"""A frozen linear layer whose rows go through the LoRA adapters of several runs at once (arXiv 2106.09685).

For every token x of run k: ``y = W x + bias + scale_k B_k A_k x``. The rows of a run stand together, so the adapters of
all runs are two batched matrix products. A rank below the table's is padded with zeros and a layer that a run does not
adapt is all zeros for it; both get gradients that are exactly zero and so stay zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emtrain.packed.batch import Dropout, Frame
from emtrain.packed.table import AdapterTable

# Shapes: K slots of the table, U units (one run's rows) in the pass, N tokens of a unit, B rows of a unit, T tokens of
# a row, R rank, I inputs and O outputs of the layer. B_k is kept transposed, as (R, O): products over tokens then write
# whole rows, which is 2 to 12 times faster than the columns of (O, R) on a CPU (32 runs of 32 tokens, rank 8).


@dataclass(frozen=True)
class Route:
    """Where the rows of one forward pass go."""

    index: slice | torch.Tensor
    """The slot of each unit, as an index into the table."""
    positions_n: torch.Tensor | None = None
    """The positions, in the flattened tokens, that logits are needed at; None for the model's usual logits."""
    dropouts: Sequence[tuple[int, Frame, Dropout]] = ()
    """Of the units that have dropout: place in the pass, own rows and tokens, and how."""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    """Dropout masks by layer: activation checkpointing runs a layer twice and must see the same one."""


class Router:
    """Holds the route that all layers of a model follow; without one the model is the base alone."""

    def __init__(self) -> None:
        self.route: Route | None = None

    @contextmanager
    def along(self, route: Route) -> Iterator[None]:
        """Follow ``route`` inside the block."""
        self.route = route
        try:
            yield
        finally:
            self.route = None

    def select_positions(self, head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """A pre-forward hook for the output head: ``(rows, tokens, inputs)`` -> ``(n, inputs)``."""
        if self.route is None or self.route.positions_n is None:
            return None
        return (inputs[0].flatten(0, 1)[self.route.positions_n],)


class PackedLinear(nn.Module):
    """A linear layer and every run's adapter of it. It holds the weights of ``linear`` under the same names."""

    def __init__(self, name: str, linear: nn.Linear, table: AdapterTable, router: Router) -> None:
        super().__init__()
        self.name, self.router = name, router
        self.weight, self.bias = linear.weight, linear.bias
        self.a_KRI, self.b_KRO = table.factors(table.operands_KP, name)
        self.a_gradient_KRI, self.b_gradient_KRO = table.factors(table.gradients_KP, name)
        self.scale_K11 = table.scale_K11
        # An input that asks for gradients, so that autograd calls backward where nothing before the layer does.
        self.anchor = torch.zeros((), device=linear.weight.device, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(rows, tokens, inputs)`` -> ``(rows, tokens, outputs)``."""
        route = self.router.route
        if route is None:
            return nn.functional.linear(x, self.weight, self.bias)
        mask = self._dropout_mask(x, route) if route.dropouts else None
        return _Routed.apply(x, self.anchor, mask, self, route.index)

    def _dropout_mask(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """What each input is multiplied by; 1 for runs without dropout."""
        if self.name not in route.masks:
            units = len(self.scale_K11[route.index])
            mask_UBTI = x.new_ones(units, len(x) // units, *x.shape[1:])
            for place, frame, dropout in route.dropouts:
                if self.name in dropout.layers:
                    # Shape, order and arithmetic of the draws are those of nn.Dropout when the run is alone.
                    own_BTI, keep = x.new_empty(frame.rows, frame.tokens, x.shape[-1]), 1 - dropout.probability
                    own_BTI.bernoulli_(keep, generator=dropout.generator).div_(keep)
                    mask_UBTI[place, : frame.rows, : frame.tokens] = own_BTI
            route.masks[self.name] = mask_UBTI.view_as(x)
        return route.masks[self.name]


class _Routed(torch.autograd.Function):
    """The layer's arithmetic. Gradients of the factors go straight into the table; autograd never sees the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        mask: torch.Tensor | None,
        layer: PackedLinear,
        index: slice | torch.Tensor,
    ) -> torch.Tensor:
        a_URI, b_URO, scale_U11 = layer.a_KRI[index], layer.b_KRO[index], layer.scale_K11[index]
        y = nn.functional.linear(x, layer.weight, layer.bias)
        x_UNI = (x if mask is None else x * mask).reshape(len(a_URI), -1, x.shape[-1])
        hidden_UNR = torch.bmm(x_UNI, a_URI.transpose(1, 2)).mul_(scale_U11)
        y.view(len(b_URO), -1, y.shape[-1]).baddbmm_(hidden_UNR, b_URO)
        ctx.save_for_backward(x_UNI, hidden_UNR, mask)
        ctx.layer, ctx.index, ctx.shape, ctx.factors = layer, index, x.shape, (a_URI, b_URO, scale_U11)
        return y

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_UNI, hidden_UNR, mask), (a_URI, b_URO, scale_U11) = ctx.saved_tensors, ctx.factors
        dy_UNO = output_gradients[0].reshape(len(b_URO), -1, b_URO.shape[-1])
        dhidden_UNR = torch.bmm(dy_UNO, b_URO.transpose(1, 2)).mul_(scale_U11)
        _add(ctx.layer.a_gradient_KRI, ctx.index, torch.bmm(dhidden_UNR.transpose(1, 2), x_UNI))
        _add(ctx.layer.b_gradient_KRO, ctx.index, torch.bmm(hidden_UNR.transpose(1, 2), dy_UNO))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_UNO.flatten(0, 1) @ ctx.layer.weight).view(ctx.shape)
            if mask is None:
                dx.view_as(x_UNI).baddbmm_(dhidden_UNR, a_URI)
            else:
                dx.addcmul_(torch.bmm(dhidden_UNR, a_URI).view_as(dx), mask)
        return dx, None, None, None, None


def _add(table_K: torch.Tensor, index: slice | torch.Tensor, gradient_U: torch.Tensor) -> None:
    # Not baddbmm_ into the table: its layers are strided there, for which the kernel loops over runs, 5 times slower.
    if isinstance(index, slice):
        table_K[index].add_(gradient_U)
    else:
        table_K.index_add_(0, index, gradient_U.to(table_K.dtype))


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one that goes by its name in ``model``."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
