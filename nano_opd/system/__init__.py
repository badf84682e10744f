"""What makes the algorithm practical. No paper is needed to read it; it knows the methods only through their table.

With it libraries.py is imported: before torch, if a program imports this package before torch.
"""

from nano_opd.system import libraries

__all__ = ["libraries"]
