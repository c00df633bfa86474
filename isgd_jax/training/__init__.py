"""The training loop: one step, who scores besides, and `fit`, which is both in time order."""
