"""How the evidence was made: experiments, claims, oracles, the table of the field, and speed.

Run a module from the folder notebooks/, such as `python -m lab.reproduce`. Then train.py, one folder up, can be
imported too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
RESULTS = ROOT / "notebooks" / "results"

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
