"""Caches with entries in few bits, by the number of entries that they keep."""

from collections.abc import Callable
from typing import Any

from kvcluster.evaluation.quality.methods import DISTINCTIVE, Method, body_ratio, shipped
from kvcluster.fast import Distinctive
from kvcluster.fast.huggingface import ClusteredCache

__all__ = ["VARIANTS", "with_bits"]

Bits = int | tuple[int, int]
# Recent tokens before the last 32 are in few bits too; a chunk has one shared entry for 64 tokens as ever.
FEW = DISTINCTIVE | {"n_exact": 32}
MIDDLE = FEW | {"chunk_size": 128, "n_recent": 124}
LONG = FEW | {"n_recent": 508}
SIZES = {"": DISTINCTIVE, "-few": FEW, "-middle": MIDDLE, "-long": LONG}


def with_bits(bits: Bits, sizes: dict[str, Any]) -> Callable[[Any, float, int], ClusteredCache]:
    """Distinctive matching whose KV heads have the shares of the model's profile, or with 1 all tokens, in `bits`."""

    def make(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
        how: dict[str, Any] = {"method": Distinctive(n_shared=sizes["chunk_size"] // 64), "bits": bits, **sizes}
        if keep == 1.0:
            return ClusteredCache.for_model(model, keep_ratio=1.0, **how)
        ratio = body_ratio(keep, n_tokens, **{name: sizes[name] for name in DISTINCTIVE})
        return ClusteredCache.for_model(model, keep_ratio=ratio, profile=shipped(model), **how)

    return make


def named(bits: Bits) -> str:
    return "-".join(map(str, bits)) if isinstance(bits, tuple) else str(bits)


VARIANTS = {
    f"bits-{named(bits)}{end}": Method(
        with_bits(bits, sizes), f"{named(bits)} bits, the model's profile", is_blind=True, profile=shipped
    )
    for bits in (16, 8, 4, 3, 2, (3, 2))
    for end, sizes in SIZES.items()
    if bits != 16 or "n_exact" not in sizes
}
