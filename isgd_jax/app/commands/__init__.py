"""The commands that are more than a call: what they take, as dataclasses free of jax, and what they do with it."""
