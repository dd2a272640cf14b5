"""Caches for transformers: `model.generate(..., past_key_values=ClusteredCache.for_model(model, ...))`."""

from .cache import ClusteredCache
from .chelsea_cache import ChelseaCache
from .layer_ratios import layer_ratios
from .recall_cache import RecallCache
from .whole_heads import known_whole_heads, whole_heads_of

__all__ = ["ChelseaCache", "ClusteredCache", "RecallCache", "known_whole_heads", "layer_ratios", "whole_heads_of"]
