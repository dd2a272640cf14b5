"""kvcluster: clustering the key-value cache of long-context language models.

`kvcluster.reference` defines it in NumPy, `kvcluster.fast` decides the same on torch tensors, `kvcluster.conformance`
checks other implementations, `kvcluster.evaluation` measures, `kvcluster.theory` tries to break what is claimed.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("kvcluster")
