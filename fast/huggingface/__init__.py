"""Clustered caches for transformers models: `model.generate(..., past_key_values=ClusteredCache.for_model(model, ...))`."""

from .cache import ClusteredCache

__all__ = ["ClusteredCache"]
