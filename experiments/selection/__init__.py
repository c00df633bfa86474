"""The parts of `honest.py`: the protocol, the problems, and the methods that select what to learn from."""
