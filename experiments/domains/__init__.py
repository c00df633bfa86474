"""Races on continuous domains: what is solved, how points are chosen, and the protocol; see `pinn.py`."""
