"""Learning-rate schedules, one per file: ``def NAME(total_steps, *, ...) -> Schedule``.

``total_steps`` are the steps after the warm-up. Arguments are relative (fractions of those steps, ratios to the peak),
so a schedule means the same for any run length and any learning rate. The step convention is in ``emtrain.schedule``.
"""
