"""What a proposal is worth: variances by definition and from draws, the monitor, and the gate."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
