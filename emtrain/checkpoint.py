"""The state of a run between two steps, as one file that is either whole or absent.

It holds what the next step needs and nothing else: the trained parameters, the optimiser's state by parameter name,
the dropout generator and the step. Schedules and data order are functions of the step. Both backends read and write it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEWEST = "newest.safetensors"


@dataclass(frozen=True)
class RunState:
    """``step`` updates are done; ``tokens`` were trained on so far."""

    step: int
    tokens: int
    parameters: Mapping[str, "torch.Tensor"]
    """Trained parameters by their name in the model."""
    optimizer: Mapping[str, Mapping[str, "torch.Tensor"]]
    """Per parameter name, the optimiser's tensors (``exp_avg``, ``momentum_buffer``, ``step`` ...)."""
    generator: "torch.Tensor"
    """State of the generator that dropout draws from."""


def save(state: RunState, directory: Path) -> None:
    """Make ``state`` the newest of ``directory``: written beside, synced, then renamed over the old one."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"parameter/{name}": tensor.detach().cpu().contiguous() for name, tensor in state.parameters.items()}
    for name, slots in state.optimizer.items():
        tensors |= {f"optimizer/{name}/{slot}": tensor.detach().cpu().contiguous() for slot, tensor in slots.items()}
    tensors["generator"] = state.generator
    metadata = {"state": json.dumps({"step": state.step, "tokens": state.tokens})}
    unfinished = directory / f"unfinished-{os.getpid()}.safetensors"
    try:
        save_file(tensors, unfinished, metadata=metadata)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(directory / NEWEST)
    finally:
        unfinished.unlink(missing_ok=True)


def load(directory: Path) -> RunState | None:
    """The newest state of ``directory``, on the CPU; None when there is none."""
    from safetensors import safe_open

    path = directory / NEWEST
    if not path.exists():
        return None
    parameters: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as stored:
        counts = json.loads(stored.metadata()["state"])
        for key in stored.keys():  # noqa: SIM118 - not a dict
            kind, _, name = key.partition("/")
            if kind == "parameter":
                parameters[name] = stored.get_tensor(key)
            elif kind == "optimizer":
                name, _, slot = name.rpartition("/")
                optimizer.setdefault(name, {})[slot] = stored.get_tensor(key)
        generator = stored.get_tensor("generator")
    return RunState(counts["step"], counts["tokens"], parameters, optimizer, generator)


def restore_optimizer(
    optimizer: "torch.optim.Optimizer", state: "Mapping[torch.nn.Parameter, Mapping[str, torch.Tensor]]"
) -> None:
    """Give each parameter its tensors of ``RunState.optimizer``, where and as the optimiser wants them."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {number: dict(state[parameter]) for number, parameter in enumerate(order) if state.get(parameter)}
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
