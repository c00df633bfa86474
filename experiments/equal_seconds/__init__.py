"""What `rare_events.py` and `language.py` share: the protocol of equal seconds, the arms, and what is measured."""
