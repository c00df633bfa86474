"""Run the notebooks from top to bottom, as a reader would: they assert what they claim.

Command: python experiments/notebooks/run.py [NAME ...] [--store] (`make notebooks` runs all).
Time: about 4 minutes for all on two CPU cores.

`--store` writes the outputs back into the files. The badge and the install cell are written then too, from the address
and the version in the package: that is the one place to change them. The install cell does nothing where the package
is installed already, so that here the notebooks run on this checkout.
"""

import argparse
import sys
import time
import tomllib
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode

import isgd_jax

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS_A_CELL = 300


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="01_quickstart, ...; all of them if none is named")
    parser.add_argument("--store", action="store_true", help="write outputs, badge and install cell back")
    options = parser.parse_args()
    for path in [HERE / f"{name}.ipynb" for name in options.names] or paths():
        began = time.monotonic()
        notebook = executed(nbformat.read(path, as_version=4), path)
        if options.store:
            nbformat.write(notebook, path)
        print(f"{path.stem}: all cells ran, {time.monotonic() - began:.0f} s", flush=True)


def paths() -> list[Path]:
    """All notebooks, in the order of their numbers."""
    return sorted(HERE.glob("*.ipynb"))


def executed(notebook: NotebookNode, path: Path) -> NotebookNode:
    """The notebook after a run in a fresh kernel of this Python, in its own folder, without what changes by the clock.

    Raises:
        SystemExit: a cell failed; the message is what the reader would see.
    """
    stamp(notebook, path)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS_A_CELL,
        startup_timeout=180,
        extra_arguments=["--log-level=ERROR"],  # else the kernel warns at each start that it listens on loopback
        resources={"metadata": {"path": str(HERE)}},
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        sys.exit(f"{path.name}: {error}")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def stamp(notebook: NotebookNode, path: Path) -> None:
    """Write the badge (the first cell) and the install cell (the third)."""
    notebook.cells[0].source = badge(path)
    notebook.cells[2].source = install()


def badge(path: Path) -> str:
    """The link that opens the notebook in Colab."""
    place = repository().removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{place}/blob/main/{path.relative_to(ROOT)}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def install() -> str:
    """The cell that installs the version the notebook was written for, where there is none."""
    version = isgd_jax.__version__
    at = "main" if "dev" in version else f"v{version}"
    return (
        "import importlib.util\n\n"
        'if importlib.util.find_spec("isgd_jax") is None:\n'
        f'    %pip install --quiet "isgd_jax[train] @ git+{repository()}@{at}"'
    )


def repository() -> str:
    """The address of the repository."""
    return project()["urls"]["Repository"]


def project() -> dict:
    """The project's table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


if __name__ == "__main__":
    main()
