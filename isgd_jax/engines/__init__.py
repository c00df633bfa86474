"""Engines decide who scores which examples, where and when; training only publishes parameters and collects scores."""
