"""Finding the heads that need their whole past: gates on attention, trained by reinforcement learning or by distillation."""
