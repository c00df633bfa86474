"""The command and what only it needs: configuration, run folders, data sets, models, figures and pages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["compare", "data", "models", "probe"])
