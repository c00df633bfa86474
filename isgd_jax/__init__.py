"""Importance-sampling SGD for JAX: draw the examples that still teach, reweight them, stay unbiased.

In all docstrings *the paper* is Alain, Lamb, Sankar, Courville, Bengio, "Variance Reduction in SGD by Distributed
Importance Sampling" (arXiv 1511.06481).
"""

import lazy_loader

from isgd_jax.versions import check_versions as _check_versions

_check_versions()

__version__ = "0.2.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
