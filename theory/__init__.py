"""Numbered claims, proved in prose (`exactness.md`) beside the code that tries to break them (`exactness`).

`python -m kvcluster.theory.exactness` runs all checks of one page; it needs torch.
"""

__all__ = ["exactness"]
