"""Importance-sampling SGD for JAX: draw the examples that still teach, reweight them, stay unbiased."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
