"""Which rows each optimiser step sees."""

import numpy as np
import numpy.typing as npt

from emtrain.seeds import derive


def row_order(rows: int, *, batch_size: int, total_steps: int, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers of every step, ``(total_steps, batch_size)``.

    The rows are shuffled anew for each epoch and the epochs follow each other without a gap, so every batch is full
    and a batch may end one epoch and begin the next. (The Hugging Face trainers end each epoch with a smaller batch
    instead; the number of steps of one epoch is the same.)
    """
    needed = total_steps * batch_size
    epochs = -(-needed // rows)
    shuffled = [np.random.default_rng(derive(seed, "order", epoch)).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(shuffled)[:needed].reshape(total_steps, batch_size)
