"""Engines decide who scores which examples, where and when; training only publishes parameters and collects scores.

`inline` scores between the steps, `local` on other devices of this host, `ray_cluster` on other hosts, `replay` does an
earlier run's work again. An engine of one's own has the three methods of `Engine`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
