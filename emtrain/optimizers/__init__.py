"""Optimisers, one per file: ``def NAME(parameters, *, learning_rate, weight_decay, ...) -> torch.optim.Optimizer``.

``learning_rate`` is the peak; the schedule scales it at every step. Weight decay is decoupled and scaled by the
learning rate unless the file says otherwise. torch is imported when an optimiser is made, not when its
signature is read.
"""
