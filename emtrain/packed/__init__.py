"""The packed engine: many LoRA runs share every forward and backward pass of one frozen base model."""
