"""The engine: one frozen base model on which many LoRA runs take their steps together.

The rows of all runs go through the same forward and backward passes, each row through its own run's adapter. All else
is a run's own: rows, schedule, optimiser, clipping, loss denominator, generator. Runs join and leave between steps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from emtrain.checkpoint import RunState
from emtrain.packed import costs
from emtrain.packed.batch import Frame, Pass, Unit, assemble, group, index_of
from emtrain.packed.frozen import FrozenLinear, by_onednn, frozen_norms
from emtrain.packed.layer import PackedLinear, Route, Router, Siblings, readers, replace
from emtrain.packed.loss import token_losses
from emtrain.packed.packable import adapted_layers
from emtrain.packed.run import Run
from emtrain.packed.table import AdapterTable
from emtrain.spec import RunSpec
from emtrain.train import NonFiniteLoss, Step, TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shapes: K slots, U units of a pass, n positions that logits are needed at, P weights of a row of the table.


class Engine:
    """Up to ``capacity`` runs on ``model``, which is itself again after ``close``. Not for several threads at once.

    ``most_tokens``: of one pass, padding included; it bounds the memory of activations, however many runs there are,
    and may be changed between steps. ``overhead``: what a pass costs beside its tokens, in tokens; runs of unlike shape
    share a pass while that costs less padding. None estimates both (``emtrain.packed.costs``). ``frame`` makes the
    engine deterministic: every pass has ``capacity`` units of this frame, so that no run's numbers depend on its
    neighbours, to the bit. A model with activation checkpointing keeps it.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        capacity: int,
        most_tokens: int | None = None,
        overhead: int | None = None,
        frame: Frame | None = None,
    ) -> None:
        self.model, self.capacity = model, capacity
        self.runs: list[Run] = []
        self.most_tokens = most_tokens or costs.most_tokens(model, model.device, model.dtype.itemsize)
        self._overhead = costs.overhead_tokens(model, model.device) if overhead is None else overhead
        self._frame = frame
        self._checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self._modules = dict(model.named_modules())
        self._head = model.get_output_embeddings()
        # Subclasses stay as they are: ``adapted_layers`` refuses a run that adapts one.
        self._linears = {name: module for name, module in self._modules.items() if type(module) is nn.Linear}
        # Dropout parts siblings, which moves rounding; a frame allows no such influence of one run on another.
        self._readers = readers(model, self._linears) if frame is None else [[name] for name in self._linears]
        self._norms = frozen_norms(self._modules)
        self._before = model.training, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False).eval()
        # Elsewhere torch's own are as fast, and have no Python in their backward pass.
        replace(model, {name: FrozenLinear(own) for name, own in self._linears.items() if by_onednn(own.weight)})
        replace(model, self._norms)
        self._router = Router()
        self._table = self._install(set(), rank=1)
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._router.select_positions)

    def step(self, runs: Sequence[Run] | None = None) -> dict[Run, Step | NonFiniteLoss]:
        """One optimiser step of every run, or of ``runs`` alone; the others keep their places and wait.

        A run whose loss or gradient is not finite is not updated and has left the engine. When this raises, for want of
        memory say, every run is as before, and the step can be taken again with a lower ``most_tokens``.
        """
        runs = list(self.runs if runs is None else runs)
        units = {run: self._next_units(run) for run in runs}
        with _rewound_on_failure(run.generator for run in runs if run.adapter.dropout):
            losses_K = self._accumulate_gradients(self._plan(units))
        norms_K = torch.linalg.vector_norm(self._table.gradients_KP, dim=1)
        losses, norms = torch.stack([losses_K, norms_K]).tolist()  # the one time that the host waits for the device
        outcomes = {
            run: run.update(losses[run.slot], norms[run.slot], sum(unit.tokens for unit in units[run])) for run in runs
        }
        self._table.refresh()
        for run, outcome in outcomes.items():
            if isinstance(outcome, NonFiniteLoss):
                self.leave(run)
        return outcomes

    def _next_units(self, run: Run) -> list[Unit]:
        if self._frame is not None:
            return run.next_units(most_rows=self._frame.rows, most_tokens=self._frame.size)
        return run.next_units(most_rows=run.spec.batch_size, most_tokens=self.most_tokens)

    def _plan(self, units: Mapping[Run, Sequence[Unit]]) -> list[Pass]:
        """The passes of a step: the first unit of every run, then the second of those that have one, and so on."""
        weights = {run.slot: 1 / sum(unit.response_tokens for unit in of_run) for run, of_run in units.items()}
        fixed = (self.capacity, self._frame) if self._frame is not None else None
        passes = []
        for turn in zip_longest(*units.values()):
            present = [unit for unit in turn if unit is not None]
            groups = [present] if fixed else group(present, overhead=self._overhead, limit=self.most_tokens)
            passes += [assemble(members, weights, device=self.model.device, fixed=fixed) for members in groups]
        return passes

    def _accumulate_gradients(self, passes: Sequence[Pass]) -> torch.Tensor:
        """The gradients of the runs' losses into the table; returns the losses, ``(K,)``."""
        if self.model.training != self._checkpointing:
            self.model.train(self._checkpointing)  # layers are checkpointed in training mode only
        self._table.gradients_KP.zero_()
        losses_K = self._table.gradients_KP.new_zeros(self.capacity)
        for batch in passes:
            losses_K += self._forward_backward(batch)
        return losses_K

    def _forward_backward(self, batch: Pass) -> torch.Tensor:
        """Add one pass to the gradients in the table; returns its part of the losses, ``(K,)``."""
        with self._router.along(Route(batch.index, batch.positions_n, batch.dropouts)):
            logits_nV = self.model(input_ids=batch.input_ids, use_cache=False).logits
            losses_n = token_losses(logits_nV, batch.targets_n)
            losses_n = losses_n * batch.weights_n.to(losses_n.dtype)
            losses_n.sum().backward()
        losses_K = losses_n.new_zeros(self.capacity)
        losses_K[batch.index] = torch.segment_reduce(losses_n.detach(), "sum", lengths=batch.positions_U, unsafe=True)
        return losses_K

    def join(self, spec: RunSpec, data: TrainingData, *, total_steps: int, state: RunState | None = None) -> Run:
        """Give a run a slot, from its first step or from ``state``, which either backend may have saved.

        Raises ``ValueError`` when all slots are taken, or when the run can't be packed.
        """
        if len(self.runs) == self.capacity:
            raise ValueError(
                f"all {self.capacity} slots of the engine are taken; a run must leave before another joins"
            )
        if spec.adapter == "full":
            raise ValueError("adapter is 'full'; runs that train every weight can't share a base: use the trl backend")
        layers = adapted_layers(self._modules, self._head, spec.adapter)
        if self._frame is not None:
            _check_frame(self._frame, spec, data)
        if not self._table.covers(layers, spec.adapter.rank):
            self._enlarge(layers, spec.adapter.rank)
        run = Run(spec, spec.adapter, data, total_steps, layers)
        taken = {other.slot for other in self.runs}
        run.enter(self._table, min(set(range(self.capacity)) - taken), self.model.dtype, state)
        self.runs.append(run)
        return run

    def leave(self, run: Run) -> None:
        """Free the run's slot."""
        self.runs.remove(run)
        self._table.clear(run.slot)

    @contextmanager
    def acting_as(self, *runs: Run) -> Iterator["PreTrainedModel"]:
        """The model as these runs have trained it, inside the block; no step may be taken there.

        Rows come in as many blocks of one size as there are runs, in their order.
        """
        if self.model.training:
            self.model.eval()
        with self._router.along(Route(index_of([run.slot for run in runs], self.model.device))):
            yield self.model

    def close(self) -> None:
        """Make the model what it was before. Runs still in the engine are lost."""
        self.runs.clear()
        replace(self.model, {name: self._modules[name] for name in (*self._linears, *self._norms)})
        self._hook.remove()
        training, parameters = self._before
        self.model.train(training)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _enlarge(self, layers: Sequence[str], rank: int) -> None:
        """Make room for an adapter of this rank on these layers: a new table, into which all runs move."""
        states = [(run, run.state()) for run in self.runs]
        self._table = self._install({*layers, *self._table.layers}, max(rank, self._table.rank))
        for run, state in states:
            run.enter(self._table, run.slot, self.model.dtype, state)

    def _install(self, layers: Set[str], rank: int) -> AdapterTable:
        groups = [
            {name: self._linears[name] for name in names if name in layers}
            for names in self._readers
            if not layers.isdisjoint(names)
        ]
        table = AdapterTable(
            [{name: (linear.out_features, linear.in_features) for name, linear in group.items()} for group in groups],
            capacity=self.capacity,
            rank=rank,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        for siblings in (Siblings(linears, table) for linears in groups):
            names = siblings.layers
            replace(self.model, {name: PackedLinear(name, siblings, table, self._router) for name in names})
        return table


@contextmanager
def _rewound_on_failure(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Generators back to where they were, should the block raise."""
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in states:
            generator.set_state(state)
        raise


def _check_frame(frame: Frame, spec: RunSpec, data: TrainingData) -> None:
    longest = max(len(row.input_ids) for row in data.train)
    if longest > frame.tokens:
        raise ValueError(f"the engine's frame has {frame.tokens} tokens, but the run has a row of {longest}")
    if spec.adapter != "full" and spec.adapter.dropout and spec.micro_rows > frame.rows:
        raise ValueError(
            f"the engine's frame has {frame.rows} rows, but the run's micro-batches, by which it draws dropout, "
            f"{spec.micro_rows}"
        )
