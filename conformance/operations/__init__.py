"""The operations of the suite, a file each: its cases, its mistakes, how it is called. A new one is a file and a line.

Checks and files of vectors follow the order below.
"""

from importlib import import_module

from ..operation import Operation

__all__ = ["OPERATIONS"]

FILES = (
    "alternating_partition",
    "similarity",
    "chunked_soft_matching",
    "distinctive_matching",
    "attended_matching",
    "merge",
    "attention",
    "clustered_attention",
    "quantize",
    "clustered_cache",
    "chelsea_cache",
    "ragged_cache",
    "kmeans",
    "select_clusters",
    "recall_attention",
    "recall_cache",
)
LOADED: list[Operation] = [import_module(f".{name}", __name__).OPERATION for name in FILES]
OPERATIONS = {operation.name: operation for operation in LOADED}
