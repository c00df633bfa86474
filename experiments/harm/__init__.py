"""Twelve problems on which plain SGD and importance sampling meet, and the protocol; see `do_no_harm.py`."""
