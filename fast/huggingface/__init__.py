"""Caches for transformers: `model.generate(..., past_key_values=ClusteredCache.for_model(model, ...))`."""

from .cache import ClusteredCache
from .recall_cache import RecallCache

__all__ = ["ClusteredCache", "RecallCache"]
