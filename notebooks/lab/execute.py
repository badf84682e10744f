"""Execute notebooks in a fresh kernel: `python -m lab.execute [--quick] [--write] [notebook …]` (default: all).

--quick  the miniature of continuous integration (NANO_OPD_QUICK=1)
--write  store the outputs; without it the notebooks must only run

Exits with 1 and the traceback of the first cell that fails.
"""

import argparse
import base64
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1]  # notebooks/


def halve_the_shown_size(notebook: nbformat.NotebookNode) -> None:
    """Let pages show the figures, which have 200 pixels to an inch, at 100, so that they fit and are sharp."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                output.metadata["image/png"] = {"width": picture.width // 2, "height": picture.height // 2}


def execute(path: Path, write: bool) -> str:
    """Run one notebook; its name and seconds. Raises CellExecutionError at the first cell that fails."""
    started = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.execute(cwd=FOLDER)
    if write:
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        halve_the_shown_size(notebook)
        nbformat.write(notebook, path)
    return f"{path.name}: {time.monotonic() - started:.0f} s"


def main() -> None:
    """Execute two notebooks at a time."""
    parser = argparse.ArgumentParser(description="Execute notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    paths = options.notebooks
    if not paths:
        paths = sorted(FOLDER.glob("*.ipynb"))
    os.environ["NANO_OPD_QUICK"] = "1" if options.quick else "0"
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the kernels
    with ThreadPoolExecutor(2) as pool:  # each notebook computes in one thread of a kernel of its own
        futures = {pool.submit(execute, path, options.write): path for path in paths}
        for future, path in futures.items():
            try:
                print(future.result(), flush=True)
            except CellExecutionError as error:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{path.name}: {error}")


if __name__ == "__main__":
    main()
