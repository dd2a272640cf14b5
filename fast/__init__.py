"""The fast path: torch tensors, the decisions of `kvcluster.reference`, bit for bit.

Every function and class is defined by its namesake there. Labels, counts, centroids and caches are identical;
attention outputs agree within the bound of `kvcluster.reference.agreement`. `kvcluster.fast.huggingface` puts the
cache into transformers models.
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

ARRAYS = "torch"  # what `kvcluster check` gives to the names below

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
