"""Build the API reference from the docstrings, with pdoc: `make docs`, or python docs/build.py [FOLDER].

Any warning, of a type that cannot be found or an import that fails, is an error.
"""

import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

ROOT = Path(__file__).parent.parent
FURTHER = ("types", "training", "app.config", "app.run", "app.run_dir")
"""Modules that users meet beside the public names of the package, which come by themselves."""


def main(folder: Path) -> None:
    """Write the pages into a folder."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*Import of ArrayTree failed")  # Chex names a type by itself
    pdoc.render.configure(docformat="google", footer_text="isgd_jax", search=True)
    pdoc.pdoc("isgd_jax", *(f"isgd_jax.{name}" for name in FURTHER), output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "api")
