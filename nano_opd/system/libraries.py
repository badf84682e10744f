"""Import the libraries that read the environment, so that a bad value there stops no run.

torch imports tqdm itself, so this must be imported before torch. nano_opd.system imports it, and train.py imports
something of nano_opd.system before torch.

No variable matters to the numbers, and matplotlib's backend does not even matter to the figures: they are written to
files.
"""

import contextlib
import os
import sys


def _figure():
    """Return matplotlib's Figure. MPLBACKEND has its usual effect if it names a backend, and none if it does not."""
    backend = None
    if "matplotlib" not in sys.modules:  # which would raise an error while it is imported
        backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return Figure


def _tqdm():
    """Return tqdm's bar. Its defaults are those of the variables TQDM_…, unless one of them has a bad value."""
    try:
        from tqdm import tqdm
    except ValueError:
        ours = {name: value for name, value in os.environ.items() if name.startswith("TQDM_")}
        for name in ours:
            del os.environ[name]
        try:
            from tqdm import tqdm
        finally:
            os.environ.update(ours)
    return tqdm


Figure = _figure()
tqdm = _tqdm()
