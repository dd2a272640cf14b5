"""Caches for transformers: `model.generate(..., past_key_values=ClusteredCache.for_model(model, ...))`."""

from .cache import ClusteredCache
from .layer_ratios import layer_ratios
from .recall_cache import RecallCache

__all__ = ["ClusteredCache", "RecallCache", "layer_ratios"]
