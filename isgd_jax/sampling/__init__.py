"""From scores to draws: score table, proposal and samplers, and the estimator that is all of them around one state."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
