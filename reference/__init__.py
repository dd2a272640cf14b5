"""The definition: KV-cache clustering in plain NumPy, to be read from top to bottom.

Reading order, one idea more in each file:

1. `attention`            what a KV cache is for
2. `similarity`           how alike two keys are, the same bits on every machine
3. `partition`            who may merge with whom
4. `merging`              a cluster becomes one centroid
5. `soft_matching`        which tokens of a chunk share a cluster (arXiv:2506.11418)
6. `clustered_attention`  attention to centroids, corrected by log counts
7. `cache`                all of it online, while tokens arrive
8. `rotary`, `llama`      a whole Llama that generates from such a cache

`arguments` holds the checks of inputs, `agreement` the error bound that every other implementation of
attention is held to. Nothing here is optimised; `kvcluster.fast` is, and decides
the same.
"""

from .attention import attention
from .cache import ClusteredCache
from .clustered_attention import clustered_attention
from .merging import Clustering, merge
from .partition import alternating_partition
from .similarity import similarity
from .soft_matching import chunked_soft_matching

__all__ = [
    "ClusteredCache",
    "Clustering",
    "alternating_partition",
    "attention",
    "chunked_soft_matching",
    "clustered_attention",
    "merge",
    "similarity",
]
