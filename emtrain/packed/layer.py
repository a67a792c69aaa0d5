"""A frozen linear layer whose rows go through the LoRA adapters of several runs at once (arXiv 2106.09685).

For every token x of run k: ``y = W x + bias + scale_k B_k A_k x``. The rows of a run stand together, so the adapters of
all runs are two batched matrix products. A rank below the table's is padded with zeros and a layer that a run does not
adapt is all zeros for it; both get gradients that are exactly zero and so stay zero.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emtrain.packed.batch import Dropout, Frame
from emtrain.packed.frozen import FrozenLinear, product
from emtrain.packed.table import AdapterTable

# Shapes: K slots of the table, U units (one run's rows) in the pass, N tokens of a unit, B rows of a unit, T tokens of
# a row, R rank, S the ranks of all siblings together, I inputs and O outputs of a layer. B_k is kept transposed, as
# (R, O): products over tokens then write whole rows, which is 2 to 12 times faster than the columns of (O, R) on a CPU
# (32 runs of 32 tokens, rank 8). torch's grouped_mm, for groups of unlike size, takes 1.2 to 2.3 times as long as bmm.


@dataclass(frozen=True)
class Route:
    """Where the rows of one forward pass go."""

    index: slice | torch.Tensor
    """The slot of each unit, as an index into the table."""
    positions_n: torch.Tensor | None = None
    """The positions, in the flattened tokens, that logits are needed at; None for the model's usual logits."""
    dropouts: Sequence[tuple[int, Frame, Dropout]] = ()
    """Of the units that have dropout: place in the pass, own rows and tokens, and how."""
    ahead: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Input and output of layers that were computed along with a sibling and are not asked for yet."""
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


class Siblings:
    """Adapted layers that read the same input, as query, key and value do, or one by itself.

    What does not depend on the outputs, the products with the input, is done once for all of them.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], table: AdapterTable) -> None:
        self.layers, names = layers, list(layers)
        self.a_KSI, self.b_KRO = table.factors(table.operands_KP, names)
        self.a_gradient_KSI, self.b_gradients_KRO = table.factors(table.gradients_KP, names)
        self.scale_K11 = table.scale_K11
        # An input that asks for gradients, so that autograd calls backward where nothing before the layers does.
        self.anchor = torch.zeros((), device=table.values_KP.device, requires_grad=True)

    def outputs(
        self, x: torch.Tensor, index: slice | torch.Tensor, mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """``(rows, tokens, inputs)`` -> ``(rows, tokens, outputs)`` by layer; ``mask`` is what dropout makes of x."""
        return dict(zip(self.layers, _Routed.apply(x, self.anchor, mask, self, index), strict=True))


class PackedLinear(FrozenLinear):
    """The layer ``name`` of ``siblings`` and every run's adapter of it."""

    def __init__(self, name: str, siblings: Siblings, table: AdapterTable, router: Router) -> None:
        super().__init__(siblings.layers[name])
        self.name, self.siblings, self.router = name, siblings, router
        self.alone = Siblings({name: siblings.layers[name]}, table) if len(siblings.layers) > 1 else siblings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(rows, tokens, inputs)`` -> ``(rows, tokens, outputs)``."""
        route = self.router.route
        if route is None:
            return super().forward(x)
        if route.dropouts:  # every layer draws its own
            return self.alone.outputs(x, route.index, self._dropout_mask(x, route))[self.name]
        read, y = route.ahead.pop(self.name, (None, None))
        if read is x and y is not None:
            return y
        outputs = self.siblings.outputs(x, route.index)
        y = outputs.pop(self.name)
        route.ahead.update({name: (x, output) for name, output in outputs.items()})
        return y

    def _dropout_mask(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """What each input is multiplied by; 1 for runs without dropout."""
        if self.name not in route.masks:
            units = len(self.alone.scale_K11[route.index])
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
    """The layers' arithmetic. Gradients of the factors go straight into the table; autograd never sees the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        mask: torch.Tensor | None,
        siblings: Siblings,
        index: slice | torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        a_USI, scale_U11 = siblings.a_KSI[index], siblings.scale_K11[index]
        b_URO = [b_KRO[index] for b_KRO in siblings.b_KRO]
        x_UNI = (x if mask is None else x * mask).reshape(len(a_USI), -1, x.shape[-1])
        hidden_UNS = torch.bmm(x_UNI, a_USI.transpose(1, 2)).mul_(scale_U11)
        outputs = []
        parts = zip(siblings.layers.values(), hidden_UNS.chunk(len(b_URO), dim=2), b_URO, strict=True)
        for layer, hidden_UNR, b in parts:
            y = product(x, layer.weight, layer.bias)
            y.view(len(b), -1, y.shape[-1]).baddbmm_(hidden_UNR, b)
            outputs.append(y)
        ctx.save_for_backward(x_UNI, hidden_UNS, mask)
        ctx.siblings, ctx.index, ctx.shape, ctx.factors = siblings, index, x.shape, (a_USI, b_URO, scale_U11)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_UNI, hidden_UNS, mask), (a_USI, b_URO, scale_U11) = ctx.saved_tensors, ctx.factors
        siblings, index = ctx.siblings, ctx.index
        dy_UNO = [dy.reshape(len(x_UNI), -1, dy.shape[-1]) for dy in output_gradients]
        dhidden_UNR = [torch.bmm(dy, b.transpose(1, 2)) for dy, b in zip(dy_UNO, b_URO, strict=True)]
        dhidden_UNS = torch.cat(dhidden_UNR, dim=2).mul_(scale_U11)
        _add(siblings.a_gradient_KSI, index, torch.bmm(dhidden_UNS.transpose(1, 2), x_UNI))
        hidden_SUN = hidden_UNS.transpose(1, 2).chunk(len(dy_UNO), dim=1)
        for b_gradient_KRO, hidden_URN, dy in zip(siblings.b_gradients_KRO, hidden_SUN, dy_UNO, strict=True):
            _add(b_gradient_KRO, index, torch.bmm(hidden_URN, dy))
        dx = None
        if ctx.needs_input_grad[0]:
            pairs = zip(dy_UNO, siblings.layers.values(), strict=True)
            products = (product(dy, layer.weight.T) for dy, layer in pairs)
            dx_UNI = functools.reduce(torch.Tensor.add_, products)  # no more than two of them are there at once
            if mask is None:
                dx_UNI.baddbmm_(dhidden_UNS, a_USI)
            else:
                dx_UNI.addcmul_(torch.bmm(dhidden_UNS, a_USI), mask.view_as(dx_UNI))
            dx = dx_UNI.view(ctx.shape)
        return dx, None, None, None, None


def _add(table_K: torch.Tensor, index: slice | torch.Tensor, gradient_U: torch.Tensor) -> None:
    # Not baddbmm_ into the table: its layers are strided there, for which the kernel loops over runs, 5 times slower.
    if isinstance(index, slice):
        table_K[index].add_(gradient_U)
    else:
        table_K.index_add_(0, index, gradient_U.to(table_K.dtype))


@torch.no_grad()
def readers(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of ``modules``, together where they read the same tensor, in the order of their calls by ``model``."""
    inputs: list[torch.Tensor] = []  # kept, so that no two have the same id
    found: dict[str, int] = {}

    def note(name: str, read: torch.Tensor) -> None:
        inputs.append(read)
        found.setdefault(name, id(read))

    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments[0]))
            hooks.callback(hook.remove)
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    together: dict[int | str, list[str]] = {}
    for name in [*found, *(name for name in modules if name not in found)]:
        together.setdefault(found.get(name, name), []).append(name)
    return list(together.values())


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one that goes by its name in ``model``."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
