"""What is known of a shipped model before it is loaded; nothing here imports torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFamily:
    """A model of ``emtrain/models``. Its directories are made on first use and kept."""

    model_type: str
    """As in the model's ``config.json``."""
    instruct: Callable[[], Path]
    """The directory of the checkpoint that goes by the family's name."""
    pretrained: Callable[[], Path] | None = None
    """The directory of ``<name>-pretrained``, the checkpoint before instruction tuning; None where there is none."""
