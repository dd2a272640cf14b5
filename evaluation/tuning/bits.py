"""In how many bits entries should be stored at a share of the bytes: in those that lose least on the tuning half.

Fewer bits buy more entries for the same bytes. At each of `BYTES_RATIOS` every number of bits is tried, with as many
entries as fit, shared out by the profile that has just been found.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.progress import Progress

from kvcluster.fast import Distinctive
from kvcluster.fast.huggingface import ClusteredCache, Profile
from kvcluster.fast.huggingface.bytes_ratio import BITS, N_EXACT, share_of_bytes
from kvcluster.fast.huggingface.hooks import head_dim

from ..runs import Runs
from .losses import Losses, loss_cases
from .shares import N_RECENT, N_SINK

__all__ = ["BYTES_RATIOS", "best_bits", "candidates"]

BYTES_RATIOS = (0.04, 0.06, 0.08, 0.12, 0.18, 0.25)  # of clustered entries over all their tokens in 16 bits
ITEMSIZE = 2  # bytes of a number in 16 bits


def candidates(bytes_ratio: float, dim: int) -> Iterator[tuple[int, float]]:
    """Bits and the part of the entries that fit, down to the first number of bits in which all do.

    >>> [(bits, round(kept, 2)) for bits, kept in candidates(0.25, dim=64)]
    [(8, 0.44), (4, 0.78), (3, 0.97), (2, 1.0)]
    """
    for bits in BITS:
        kept = min(1.0, bytes_ratio / share_of_bytes(bits, dim, ITEMSIZE))
        yield bits, kept
        if kept == 1.0:
            return


def in_bits(model: Any, profile: Profile, bits: int, kept: float) -> ClusteredCache:
    """An empty cache by distinctive matching, with `profile`'s shares."""
    sizes: dict[str, Any] = {"n_sink": N_SINK, "n_recent": N_RECENT, "n_exact": N_EXACT, "bits": bits}
    of_heads = profile if kept < 1 else None
    return ClusteredCache.for_model(model, keep_ratio=kept, method=Distinctive(), profile=of_heads, **sizes)


def best_bits(
    model: Any,
    tokenizer: Any,
    text: str,
    profile: Profile,
    runs: Runs,
    progress: Progress,
    *,
    n_contexts: int,
    n_tokens: int,
) -> dict[str, Any]:
    """For each of `BYTES_RATIOS` the bits with the least mean loss over contexts, of equal ones the most; and losses.

    Losses are as in `Losses`, those of each context under `contexts_bits`.
    """
    cases = loss_cases(tokenizer, text, n_contexts=n_contexts, n_tokens=n_tokens)
    dim = head_dim(model.config)
    options = [(ratio, bits, kept) for ratio in BYTES_RATIOS for bits, kept in candidates(ratio, dim)]
    task = progress.add_task("Bits at equal bytes", total=len(cases) * len(options))
    of_cases, seconds = [], []
    for case in cases:
        of_case = Losses(model, case, runs, lambda: progress.advance(task))
        losses = []
        for ratio, bits, kept in options:
            own = {"bytes_ratio": ratio, "bits": bits, "n_exact": N_EXACT, "profile": profile.digest}
            losses.append(of_case.over_full(own, partial(in_bits, model, profile, bits, kept)))
        of_cases.append(losses)
        seconds += of_case.seconds
    means = [round(math.fsum(losses) / len(losses), 6) for losses in zip(*of_cases, strict=True)]
    found = []
    for ratio in BYTES_RATIOS:
        of_ratio = {bits: mean for (at, bits, _), mean in zip(options, means, strict=True) if at == ratio}
        least = min(of_ratio, key=of_ratio.__getitem__)
        losses_by_bits = {str(bits): mean for bits, mean in of_ratio.items()}  # JSON has no other names
        found.append({"bytes_ratio": ratio, "bits": least, "losses": losses_by_bits})
    contexts = [{"case": case.fingerprint, "losses": losses} for case, losses in zip(cases, of_cases, strict=True)]
    return {"bits": found, "contexts_bits": contexts, "seconds_bits": round(math.fsum(seconds), 1)}
