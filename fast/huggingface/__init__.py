"""Clustered caches for transformers: `model.generate(..., past_key_values=ClusteredCache.for_model(model, ...))`."""

from .cache import ClusteredCache

__all__ = ["ClusteredCache"]
