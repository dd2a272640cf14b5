"""The definition: KV-cache clustering in plain NumPy, to be read from top to bottom.

An evening, one idea more in each file:

1. `attention`            what a KV cache is for
2. `similarity`           how alike two keys are, the same bits on every machine
3. `partition`            who may merge with whom
4. `merging`              a cluster becomes one centroid
5. `chunks`               many tokens, clustered a chunk at a time
6. `soft_matching`        which tokens of a chunk share a cluster (arXiv:2506.11418)
7. `clustered_attention`  attention to centroids, corrected by log counts
8. `entry_cache`          what a cache holds
9. `cache`                all of it online, while tokens arrive

A whole model:

10. `rotary`, `llama`     a Llama that generates from such a cache

Beyond, ours:

11. `distinctive_matching`            tokens that stand out stay exact, for answers that must not get lost
12. `span_merging`, `bounded_cache`   a cache that keeps within a budget

The cache as the paper has it, as far as that is known:

13. `whole_heads`                     heads that keep every token (of caches 9 and 15)
14. `pooled_matching`                 all chunks of a head compete for the merges
15. `chelsea_cache`                   compressed to a budget of prompt and generation, when that is exceeded

KV heads with shares of their own, for a model whose heads differ, entries in few bits, and what is looked at:

16. `ragged_cache`                    each head as in a cache with its own keep_ratio
17. `quantization`, `quantized_body`  32 numbers with a scale of their own (of caches 9 and 16)
18. `attended_matching`               tokens that the next ones look at stay exact, beside those that stand out
19. `recent_queries`                  the few queries that a cache remembers for that (of caches 9 and 16)

And the other way to cluster, which forgets nothing (ClusterKV, arXiv:2412.03213):

20. `kmeans`              clusters of keys that point in similar directions
21. `cluster_scores`      how near a cluster lies to a query
22. `selection`           a budget of tokens, spent on the nearest clusters
23. `recall`              attention to the tokens of these clusters
24. `segments`, `sampling`  which tokens are clustered together, when, and where their clusters begin
25. `recall_cache`        all of it online

`arguments` holds the checks of inputs, `agreement` the error bound that every other implementation of attention is held
to. SPECIFICATION.md states all this in words, and `kvcluster.conformance` checks other implementations against it.
Nothing here is optimised; `kvcluster.fast` is, and decides the same.

Fifteen words:

sink          one of the first tokens of a sequence, never clustered
body          the tokens between sinks and recent ones, which are clustered
recent        one of the last tokens, kept exact
whole head    a KV head that keeps every token
chunk         tokens in a row that are matched together, equally many each time
span          what one chunk became, or two spans that were merged
segment       tokens in a row that are clustered together by k-means
entry         what a cache stores: a token, or the centroid of a cluster
centroid      the mean key and the mean value of a cluster
cluster       tokens that share an entry (ClusterKV: that are recalled together)
counts        tokens of each entry or cluster
source        an entry that looks for another one to join; the even ones of a chunk
destination   an entry that is joined; the odd ones of a chunk
budget        the most entries that are stored (ClusterKV: that are attended to), sinks and recent tokens included
keep_ratio    entries kept of a chunk / tokens in it
"""

from .attended_matching import Attended, attended_matching
from .attention import attention
from .bounded_cache import BoundedCache
from .cache import ClusteredCache
from .chelsea_cache import ChelseaCache
from .clustered_attention import clustered_attention
from .distinctive_matching import Distinctive, distinctive_matching
from .kmeans import Clusters, kmeans
from .merging import Clustering, merge
from .partition import alternating_partition
from .quantization import Quantized, dequantize, quantize
from .ragged_cache import RaggedCache
from .recall import recall_attention
from .recall_cache import RecallCache
from .selection import Selection, select_clusters
from .similarity import similarity
from .soft_matching import SoftMatching, chunked_soft_matching

__all__ = [
    "Attended",
    "BoundedCache",
    "ChelseaCache",
    "ClusteredCache",
    "Clustering",
    "Clusters",
    "Distinctive",
    "Quantized",
    "RaggedCache",
    "RecallCache",
    "Selection",
    "SoftMatching",
    "alternating_partition",
    "attended_matching",
    "attention",
    "chunked_soft_matching",
    "clustered_attention",
    "dequantize",
    "distinctive_matching",
    "kmeans",
    "merge",
    "quantize",
    "recall_attention",
    "select_clusters",
    "similarity",
]
