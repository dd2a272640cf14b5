"""The methods that can be compared, by name: a new one is one line of `METHODS`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcluster.fast import Attended, Distinctive, SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, Profile, RecallCache, known_profile
from kvcluster.fast.huggingface.layer_choices import OF_KEPT_RECENT
from kvcluster.fast.methods import Method as ClusteringMethod

from ..layers import full_layers

__all__ = ["METHODS", "Method", "body_entries", "by_shares", "chunked_keep_ratio", "with_profile"]

CHUNKED: dict[str, Any] = {"chunk_size": 256, "n_sink": 16, "n_recent": 64}
EXACT = 16 + 64  # sinks and recent tokens of the published cache
DISTINCTIVE: dict[str, Any] = {"chunk_size": 256, "n_sink": 4, "n_recent": 252}


@dataclass(frozen=True)
class Method:
    """How a cache is made.

    Attributes
    ----------
    make : from a model, `keep` and the tokens of the context, the cache that may store `keep * n_tokens` entries in
        each layer, sinks and recent tokens included; None for transformers' own.
    note : what tables say of it.
    has_keep : whether it depends on `keep`.
    stores_all : whether it stores every token, so that no budget of entries binds it.
    is_stepwise : whether tokens must come one by one for the method to be at work.
    is_blind : whether it decides by keys and values alone, so that its cache can be filled from a full one; for any
        other method the model reads each context again.
    profile : the profile for a model, if runs are told apart by it.
    """

    make: Callable[[Any, float, int], Any]
    note: str
    has_keep: bool = True
    stores_all: bool = False
    is_stepwise: bool = False
    is_blind: bool = False
    profile: Callable[[Any], Profile] | None = None


def body_entries(keep: float, n_tokens: int, *, chunk_size: int, n_sink: int, n_recent: int) -> int:
    """The most entries that each chunk may become, so that `n_tokens` tokens become at most `keep * n_tokens`, all in.

    Raises
    ------
    ValueError : not even one.
    """
    n_chunks = max(0, n_tokens - n_sink - n_recent) // chunk_size
    exact = n_tokens - n_chunks * chunk_size
    n_entries = int(keep * n_tokens - exact) // n_chunks if n_chunks else 0
    if n_entries < 1:
        raise ValueError(
            f"keep must leave an entry for each of {n_chunks} chunks beside {exact} exact tokens, got {keep:g} of "
            f"{n_tokens:,} tokens"
        )
    return min(n_entries, chunk_size)


def chunked_keep_ratio(keep: float, n_tokens: int) -> float:
    """The largest `keep_ratio` with which `n_tokens` tokens become at most `keep * n_tokens` entries, all included.

    Every chunk becomes a whole number of entries, so a few may be left over.
    """
    return body_entries(keep, n_tokens, **CHUNKED) / CHUNKED["chunk_size"]


def chunked(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    ratio = chunked_keep_ratio(keep, n_tokens)
    return ClusteredCache.for_model(model, keep_ratio=ratio, method=SoftMatching(), **CHUNKED)


def body_ratio(
    keep: float,
    n_tokens: int,
    *,
    chunk_size: int = DISTINCTIVE["chunk_size"],
    n_sink: int = DISTINCTIVE["n_sink"],
    n_recent: int = DISTINCTIVE["n_recent"],
) -> float:
    """Entries / tokens in the chunks of distinctive matching, so that all entries are `keep * n_tokens`."""
    n_chunks = max(0, n_tokens - n_sink - n_recent) // chunk_size
    exact = n_tokens - n_chunks * chunk_size
    ratio = (keep * n_tokens - exact) / (n_chunks * chunk_size) if n_chunks else 0.0
    if ratio * chunk_size < 1:
        raise ValueError(
            f"keep must leave an entry for each of {n_chunks} chunks beside {exact} exact tokens, got {keep:g} of "
            f"{n_tokens:,} tokens"
        )
    return min(1.0, ratio)


def with_growing_window(keep: float, n_tokens: int, part: float) -> tuple[float, dict[str, Any]]:
    """As `body_ratio`, with at least `part` of what is kept as recent tokens; and the sizes of such a cache."""
    share = part * keep
    n_recent = max(DISTINCTIVE["n_recent"], math.floor(share * n_tokens))
    return body_ratio(keep, n_tokens, n_recent=n_recent), DISTINCTIVE | {"recent_share": share}


def alike(method: ClusteringMethod) -> Callable[[Any, float, int], ClusteredCache]:
    """Caches by `method` with the sizes of distinctive matching, all layers alike."""

    def make(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
        size = DISTINCTIVE["chunk_size"]
        ratio = int(body_ratio(keep, n_tokens) * size) / size
        return ClusteredCache.for_model(model, keep_ratio=ratio, method=method, profile=None, **DISTINCTIVE)

    return make


def shipped(model: Any) -> Profile:
    """The profile that ships for `model`.

    Raises
    ------
    ValueError : there is none.
    """
    try:
        return known_profile(model)
    except LookupError as error:
        raise ValueError(str(error)) from error


def by_shares(
    method: ClusteringMethod | Sequence[ClusteringMethod], profile_of: Callable[[Any], Profile], **how: Any
) -> Callable[[Any, float, int], ClusteredCache]:
    """Caches by `method`, or one for each layer, whose KV heads have the shares of a profile; a tenth is recent.

    As `ClusteredCache.for_model` makes them, but that here what is kept has recent tokens included.
    """

    def make(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
        ratio, sizes = with_growing_window(keep, n_tokens, OF_KEPT_RECENT)
        how_kept = {"keep_ratio": ratio, "profile": profile_of(model), **sizes, **how}
        return ClusteredCache.for_model(model, method=method, **how_kept)

    return make


def whole_and_others(
    model: Any, keep: float, share: float, profile_of: Callable[[Any], Profile]
) -> tuple[list[tuple[int, int]], float]:
    """The `share` of the KV heads, at least one, that wants every token most, and what is left of `keep` for others.

    Raises
    ------
    ValueError : no heads known for the model; whole heads that need more than `keep`; a model whose layers all slide.
    """
    if not share:
        return [], keep
    layers, kv_heads = full_layers(model)
    n_heads = len(layers) * kv_heads
    n_whole = max(1, round(share * n_heads))
    left = keep * n_heads - n_whole
    if left <= 0:
        raise ValueError(f"keep must be above {n_whole} whole heads of {n_heads}, got {keep:g}")
    return profile_of(model).whole_heads(n_whole), left / (n_heads - n_whole)


def chelsea(share: float, profile_of: Callable[[Any], Profile] = shipped) -> Callable[[Any, float, int], ChelseaCache]:
    """The published cache with a share of the heads whole; what is kept is counted just after the compression."""

    def make(model: Any, keep: float, n_tokens: int) -> ChelseaCache:
        heads, of_others = whole_and_others(model, keep, share, profile_of)
        n_entries = int(of_others * n_tokens)
        if n_entries <= EXACT:
            raise ValueError(f"keep must leave a head more than {EXACT} exact tokens, got {n_entries} of {n_tokens:,}")
        ratio = min(1.0, (n_entries - 0.5) / n_tokens)  # of which `ceil` makes that number, whatever the rounding
        return ChelseaCache.for_model(model, ratio=ratio, max_new_tokens=0, whole_heads=heads)

    return make


def with_whole_heads(
    method: ClusteringMethod, share: float, profile_of: Callable[[Any], Profile] = shipped
) -> Callable[[Any, float, int], ClusteredCache]:
    """Caches by `method` with the sizes that it has without whole heads, and a share of the heads whole."""
    sizes = CHUNKED if isinstance(method, SoftMatching) else DISTINCTIVE

    def make(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
        heads, of_others = whole_and_others(model, keep, share, profile_of)
        ratio = body_entries(of_others, n_tokens, **sizes) / sizes["chunk_size"]
        return ClusteredCache.for_model(model, keep_ratio=ratio, method=method, whole_heads=heads, **sizes)

    return make


def recall(model: Any, keep: float, n_tokens: int) -> RecallCache:
    return RecallCache.for_model(model, budget=int(keep * n_tokens))


def recall_as_published(model: Any, keep: float, n_tokens: int) -> RecallCache:
    return RecallCache.as_published(model, budget=int(keep * n_tokens))


def by_profile(profile_of: Callable[[Any], Profile]) -> dict[str, Method]:
    """The methods that a profile has a say in."""
    # Runs with the whole heads that ship were measured before there were profiles, and are found without one.
    of_others = None if profile_of is shipped else profile_of

    def of(make: Callable[[Any, float, int], Any], note: str) -> Method:
        return Method(make, note, is_blind=True, profile=of_others)

    return {
        "chunked-10": of(
            with_whole_heads(SoftMatching(), 0.1, profile_of), "chunked soft matching, a tenth of the KV heads whole"
        ),
        "chelsea": of(chelsea(0.04, profile_of), "the published method, as far as known: 4 % of the KV heads whole"),
        "chelsea-10": of(chelsea(0.1, profile_of), "the same, a tenth of the KV heads whole"),
        "distinctive-heads": Method(
            by_shares(Distinctive(n_shared=4), profile_of),
            "distinctive matching, KV heads share by the model's profile",
            is_blind=True,
            profile=profile_of,
        ),
        "attended": Method(
            by_shares(Attended(), profile_of),
            "attended matching, KV heads share by the model's profile",
            profile=profile_of,
        ),
        "distinctive-10": of(
            with_whole_heads(Distinctive(n_shared=4), 0.1, profile_of),
            "distinctive matching, a tenth of the KV heads whole",
        ),
    }


METHODS = {
    "full": Method(lambda model, keep, n_tokens: None, "transformers' own cache", has_keep=False, stores_all=True),
    "chunked": Method(chunked, "chunked soft matching, equally in each chunk, no whole heads", is_blind=True),
    "chelsea-0": Method(chelsea(0.0), "the published method without its whole heads", is_blind=True),
    "distinctive": Method(alike(Distinctive(n_shared=4)), "distinctive matching, all heads alike", is_blind=True),
    **by_profile(shipped),
    "recall": Method(recall, "stores all, attends to a share", stores_all=True, is_stepwise=True, is_blind=True),
    "clusterkv": Method(
        recall_as_published,
        "stores all, recalls a share, as published",
        stores_all=True,
        is_stepwise=True,
        is_blind=True,
    ),
}


def with_profile(profile: Profile) -> dict[str, Method]:
    """`METHODS` with this profile in place of those that ship."""

    def of(model: Any) -> Profile:
        profile.check_model(model)
        return profile

    return METHODS | by_profile(of)
