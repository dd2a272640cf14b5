"""Caches made from one dictionary of plain numbers."""

from kvcluster import reference
from kvcluster.fast.memory.segments import RecallSettings
from kvcluster.fast.tiers import TieredRecallCache

__all__ = ["make_cache", "make_tiered", "of_reference"]


def make_cache(package, *, budget=None, n_shared=None, **rules):
    """With a budget the bounded cache; with `n_shared` the one by distinctive matching, else that by soft matching."""
    if budget is not None:
        return package.BoundedCache(budget=budget, **rules)
    method = package.SoftMatching() if n_shared is None else package.Distinctive(n_shared)
    return package.ClusteredCache(method=method, **rules)


def make_tiered(*, folder=None, n_steps=1, backend="auto", **settings):
    return TieredRecallCache(RecallSettings(**settings), folder=folder, n_steps=n_steps, backend=backend)


def of_reference(*, budget=None, method=None, **rules):
    """The reference's cache for the parameters of a clustered cache of `fast`."""
    if budget is not None:
        return reference.BoundedCache(budget=budget, **rules)
    named = {} if method is None else {"method": getattr(reference, type(method).__name__)(**vars(method))}
    if isinstance(rules["keep_ratio"], (list, tuple)):  # of layers that are all alike
        return reference.RaggedCache(keep_ratios=rules.pop("keep_ratio")[0], **named, **rules)
    return reference.ClusteredCache(**named, **rules)
