"""One fine-tuning run: its specification, model, data, schedule, optimiser, training and tracking."""
