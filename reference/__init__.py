"""The definition: KV-cache clustering in plain NumPy, to be read from top to bottom.

Reading order, one idea more in each file:

1. `attention`            what a KV cache is for
2. `similarity`           how alike two keys are, the same bits on every machine
3. `partition`            who may merge with whom
4. `merging`              a cluster becomes one centroid
5. `soft_matching`        which tokens of a chunk share a cluster (arXiv:2506.11418)
6. `clustered_attention`  attention to centroids, corrected by log counts
7. `cache`                all of it online, while tokens arrive; `span_merging` keeps it within a budget
8. `rotary`, `llama`      a whole Llama that generates from such a cache
9. `distinctive_matching` tokens that stand out stay exact: ours, for answers that must not get lost

And the other way to cluster, which forgets nothing (arXiv:2412.03213):

10. `kmeans`              clusters of keys that point in similar directions
11. `cluster_scores`      how near a cluster lies to a query
12. `selection`           a budget of tokens, spent on the nearest clusters
13. `recall`              attention to the tokens of these clusters
14. `segments`            which tokens are clustered together, and when
15. `recall_cache`        all of it online

`arguments` holds the checks of inputs, `agreement` the error bound that every other implementation of
attention is held to, `conformance` the suite that checks other implementations against all this, which SPECIFICATION.md
states in words. Nothing here is optimised; `kvcluster.fast` is, and decides
the same.
"""

from .attention import attention
from .cache import ClusteredCache
from .clustered_attention import clustered_attention
from .distinctive_matching import distinctive_matching
from .kmeans import Clusters, kmeans
from .merging import Clustering, merge
from .partition import alternating_partition
from .recall import recall_attention
from .recall_cache import RecallCache
from .selection import Selection, select_clusters
from .similarity import similarity
from .soft_matching import chunked_soft_matching

__all__ = [
    "ClusteredCache",
    "Clustering",
    "Clusters",
    "RecallCache",
    "Selection",
    "alternating_partition",
    "attention",
    "chunked_soft_matching",
    "clustered_attention",
    "distinctive_matching",
    "kmeans",
    "merge",
    "recall_attention",
    "select_clusters",
    "similarity",
]
