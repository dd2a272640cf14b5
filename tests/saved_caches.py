"""Caches of models that are saved and loaded, by name: their class and parameters."""

from kvcluster.fast import Attended, SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache

__all__ = ["CACHES"]

RECALLED = {"budget": 40, "n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}
CACHES = {
    "clustered": (
        ClusteredCache,
        {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()},
    ),
    "distinctive": (ClusteredCache, {"keep_ratio": [0.5, 0.25, 1.0], "chunk_size": 16, "n_sink": 2, "n_recent": 8}),
    "whole-heads": (
        ClusteredCache,
        {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "whole_heads": [(0, 1), (2, 0)]},
    ),
    "ragged": (
        ClusteredCache,
        {"keep_ratio": [[0.5, 0.2], 0.25, [1.0, 0.4]], "chunk_size": 16, "n_sink": 2, "n_recent": 8},
    ),
    "bits": (ClusteredCache, {"keep_ratio": 0.5, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "bits": (4, 3)}),
    "ragged-bits": (
        ClusteredCache,
        {**{"keep_ratio": [[0.5, 0.2], 0.25, [1.0, 0.4]], "chunk_size": 16, "n_sink": 2, "n_recent": 8}, "bits": 4},
    ),
    "chelsea": (
        ChelseaCache,
        {
            **{"ratio": 0.25, "max_new_tokens": 40, "interval": 3, "chunk_size": 16, "n_sink": 2, "n_recent": 8},
            "whole_heads": [(0, 0), (1, 1)],
        },
    ),
    "bounded": (
        ClusteredCache,
        {"budget": 60, "keep_ratio": 0.5, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()},
    ),
    "attended": (
        ClusteredCache,
        {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 40, "method": Attended(n_shared=1)},
    ),
    "recall": (RecallCache, RECALLED),
    "recall-sampled": (
        RecallCache,
        {**RECALLED, "init_seed": 3, "is_per_query_head": True, "is_exact_counted": False, "n_dense_layers": 2},
    ),
    "recall-dense-rest": (RecallCache, {**RECALLED, "n_dense_layers": 1, "centroids_for_rest": True, "max_iter": 2}),
}
