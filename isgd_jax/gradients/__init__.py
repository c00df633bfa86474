"""Per-example gradients whose last contraction is left lazy: norms and weighted means without forming them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
