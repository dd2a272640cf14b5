"""A bound on the error of clustered attention from four numbers per entry: README.md, claim M5."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from kvcluster.reference import Clustering
from kvcluster.reference.attention import scaled_logits, softmax
from kvcluster.reference.clustered_attention import log_counts

from .rounding import lengths

__all__ = ["Radii", "certificate", "most_mass", "radii"]

LARGEST_RADIUS = 600.0  # of logits; beyond, cosh would overflow
ROUNDED_UP = 1 + 2.0**-30  # more than everything below is wrong by, see notation.md


@dataclass(frozen=True, eq=False)
class Radii:
    """How far the tokens of each entry are from what stands for them, (..., entries) each, float64.

    Attributes
    ----------
    keys, values : largest Euclidean distance of a token's key (value) to the entry's.
    key_shifts, value_shifts : distance of the tokens' mean to the entry's key (value): 0, except for rounding of the
        stored centroid, or where the entry stands for only some tokens of the cluster that it is the mean of.
    """

    keys: Float64[np.ndarray, "*lead entries"]
    values: Float64[np.ndarray, "*lead entries"]
    key_shifts: Float64[np.ndarray, "*lead entries"]
    value_shifts: Float64[np.ndarray, "*lead entries"]


def radii(
    keys: np.ndarray, values: np.ndarray, clustering: Clustering, key_entries: np.ndarray, value_entries: np.ndarray
) -> Radii:
    """What a cache has to remember of tokens (..., tokens, dim) that it replaces by entries (..., entries, dim).

    Entries without tokens have radii 0. Labels of -1 belong to no entry.
    """
    radii_and_shifts = []
    for tokens, entries in ((keys, key_entries), (values, value_entries)):
        largest, shift = np.zeros(entries.shape[:-1]), np.zeros(entries.shape[:-1])
        for problem in np.ndindex(*entries.shape[:-2]):
            labels = clustering.labels[problem]
            is_held = labels >= 0
            labels = labels[is_held]
            offsets = tokens[problem][is_held].astype(np.float64) - entries[problem][labels].astype(np.float64)
            np.maximum.at(largest[problem], labels, lengths(offsets))
            sums = np.zeros(entries[problem].shape)
            np.add.at(sums, labels, offsets)
            shift[problem] = lengths(sums) / np.maximum(np.bincount(labels, minlength=len(sums)), 1)
        radii_and_shifts.append((largest * ROUNDED_UP, shift * ROUNDED_UP))
    (key_radii, key_shifts), (value_radii, value_shifts) = radii_and_shifts
    return Radii(keys=key_radii, values=value_radii, key_shifts=key_shifts, value_shifts=value_shifts)


def certificate(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, counts: np.ndarray, held: Radii, *, scale: float
) -> Float64[np.ndarray, "*lead queries"]:
    """Most that the output of `clustered_attention` is from attention to the tokens themselves (Euclidean distance).

    Parameters
    ----------
    query, keys, values, counts, scale : as given to `clustered_attention`.
    held : radii of the entries.

    Returns
    -------
    (..., queries). Valid for every query; rounding of the attention itself comes on top (`attention_rounding`).
    """
    weights = softmax(
        scaled_logits(query, keys, scale) + log_counts(counts)[..., None, :]
    )  # p, (..., queries, entries)
    output = weights @ values.astype(np.float64)
    away = lengths(values[..., None, :, :].astype(np.float64) - output[..., :, None, :])  # g, (..., queries, entries)
    size = abs(scale) * lengths(query)[..., :, None]
    radius, shift = size * held.keys[..., None, :], size * held.key_shifts[..., None, :]  # r, kappa
    within = np.minimum(  # D
        held.values[..., None, :], held.value_shifts[..., None, :] + 2 * np.tanh(radius / 2) * held.values[..., None, :]
    )
    clipped = np.minimum(radius, LARGEST_RADIUS)
    low, high = np.exp(-shift), most_mass(clipped, shift)
    bound = largest_quotient(weights, away, within, low, high)
    trivial = (away + within).max(axis=-1)
    return ROUNDED_UP * np.where(radius.max(axis=-1) > LARGEST_RADIUS, trivial, np.minimum(bound, trivial))


def largest_quotient(
    weights: np.ndarray, away: np.ndarray, within: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Maximum of `sum p (|a - 1| g + a D) / sum p a` over all `low <= a <= high`, by Dinkelbach's iteration."""
    best = np.zeros(weights.shape[:-1])
    for _ in range(100):
        gain_low = np.abs(low - 1) * away + low * (within - best[..., None])
        gain_high = np.abs(high - 1) * away + high * (within - best[..., None])
        mass = np.where(gain_high > gain_low, high, low)
        numerator = (weights * (np.abs(mass - 1) * away + mass * within)).sum(axis=-1)
        quotient = numerator / (weights * mass).sum(axis=-1)
        if (quotient <= best * (1 + 2.0**-50)).all():
            return np.maximum(quotient, best)
        best = np.maximum(quotient, best)
    raise AssertionError("the iteration did not end")


def most_mass(radius: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Largest mean of `exp(d)` over logits d of size at most `radius` whose mean is at most `shift`."""
    safe = np.where(radius > 0, radius, 1)
    return np.cosh(radius) + shift * np.where(radius > 0, np.sinh(safe) / safe, 1.0)
