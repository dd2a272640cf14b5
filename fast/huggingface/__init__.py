"""Caches for transformers: `model.generate(..., past_key_values=ClusteredCache.for_model(model, ...))`."""

from .cache import ClusteredCache
from .chelsea_cache import ChelseaCache
from .profiles import Profile, known_profile, known_whole_heads, whole_heads_of
from .recall_cache import RecallCache

__all__ = [
    "ChelseaCache",
    "ClusteredCache",
    "Profile",
    "RecallCache",
    "known_profile",
    "known_whole_heads",
    "whole_heads_of",
]
