"""Checks of the claim M5 of README.md: the certificate beside the true error, at random and in a real model."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvcluster.reference import Clustering, attention, chunked_soft_matching, clustered_attention, merge

from ..claims import Check
from ..real_cache import MODEL, real_cache
from .certificate import certificate, radii
from .checks import random_labels
from .rounding import attention_rounding, lengths

__all__ = [
    "Trial",
    "Verdict",
    "check_certificate",
    "check_certificate_on_real_keys",
    "judge",
    "random_trials",
    "real_trials",
]

N_RANDOM = 100_000
KEEP_RATIOS = (0.25, 0.9, 0.97)
N_SINK, N_RECENT, CHUNK = 4, 64, 64


@dataclass(frozen=True, eq=False)
class Trial:
    """Queries (..., queries, dim) on tokens (..., tokens, dim) that a cache of some dtype holds as clusters."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    clustering: Clustering
    dtype: type = np.float32

    @property
    def scale(self) -> float:
        return self.keys.shape[-1] ** -0.5


@dataclass(frozen=True, eq=False)
class Verdict:
    """True error of each query's output, what the certificate says, and what rounding may add: (..., queries) each."""

    error: np.ndarray
    bound: np.ndarray
    rounding: np.ndarray


def judge(trial: Trial, certify: Callable = certificate, measure: Callable = radii) -> Verdict:
    """Both attentions, by the reference, and the certificate from the radii that the cache would hold."""
    keys: np.ndarray = merge(trial.keys, trial.clustering).astype(trial.dtype)
    values: np.ndarray = merge(trial.values, trial.clustering).astype(trial.dtype)
    held = measure(trial.keys, trial.values, trial.clustering, keys, values)
    stored = trial.query, keys, values, trial.clustering.counts
    full = trial.query, trial.keys, trial.values
    scale = trial.scale
    error = attention(*full, scale=scale) - clustered_attention(*stored, scale=scale)
    shift = scale * lengths(trial.query) * held.key_shifts.max(axis=-1, keepdims=True)
    rounding = attention_rounding(*full, scale=scale) + 3 * np.exp(shift) * attention_rounding(*stored, scale=scale)
    return Verdict(lengths(error), certify(*stored, held, scale=scale), rounding)


def random_trials() -> Iterator[Trial]:
    """Batches of 50 caches with 25 queries: tight to wide clusters, values like keys or not, the worst directions."""
    rng = np.random.default_rng(5)
    shapes = [(2, 1, 1), (8, 3, 4), (24, 6, 16), (24, 1, 8), (16, 12, 64)]  # tokens, entries, dim
    spreads = (0.001, 0.03, 0.3, 1.0)
    n_caches, n_queries = 50, 25
    settings = itertools.cycle(itertools.product(shapes, spreads, (np.float32, np.float16), (0.3, 2.0)))
    for batch, ((tokens, entries, dim), spread, dtype, length) in enumerate(settings):
        if batch * n_caches * n_queries >= N_RANDOM:
            return
        clustering = random_labels(rng, (n_caches, tokens), entries)
        centres = rng.standard_normal((2, n_caches, entries, dim))
        noise = spread * rng.standard_normal((2, n_caches, tokens, dim))
        if batch % 3 == 0:
            noise[1] = noise[0] * rng.standard_normal((n_caches, 1, 1))  # values move with keys
        tokens_of = np.take_along_axis(centres, clustering.labels[None, ..., None], axis=2) + noise
        keys, values = tokens_of[0].astype(np.float32), tokens_of[1].astype(np.float32)
        query = length * rng.standard_normal((n_caches, n_queries, dim)) * dim**0.5
        along = keys[:, :1] - centres[0][:, clustering.labels[0, :1]]  # from a centre to one of its tokens
        query[:, ::2] = along / np.maximum(lengths(along)[..., None], 1e-9) * lengths(query[:, ::2])[..., None]
        yield Trial(query.astype(np.float32), keys, values, clustering, dtype)


def real_trials(keep_ratio: float, model: str = MODEL) -> Iterator[Trial]:
    """Every layer of `real_cache` after 512 tokens, as `ClusteredCache` stores them; the next 16 tokens' queries."""
    cache = real_cache(model)
    for query, keys, values in zip(cache.queries, cache.keys, cache.values, strict=True):
        yield Trial(query, keys, values, cache_clustering(keys, keep_ratio))


def cache_clustering(keys: np.ndarray, keep_ratio: float) -> Clustering:
    """Sinks and recent tokens alone, the body between them in clusters; keys (heads, tokens, dim)."""
    heads, tokens = keys.shape[:2]
    n_body = (tokens - N_SINK - N_RECENT) // CHUNK * CHUNK
    body = chunked_soft_matching(keys[:, N_SINK : N_SINK + n_body], keep_ratio=keep_ratio, chunk_size=CHUNK)
    n_entries = body.counts.shape[-1]
    sinks = np.broadcast_to(np.arange(N_SINK), (heads, N_SINK))
    recent = np.broadcast_to(np.arange(tokens - N_SINK - n_body), (heads, tokens - N_SINK - n_body))
    labels = np.concatenate([sinks, N_SINK + body.labels, N_SINK + n_entries + recent], axis=-1)
    counts = np.concatenate([np.ones_like(sinks), body.counts, np.ones_like(recent)], axis=-1)
    return Clustering(labels, counts)


def check_trials(trials: Iterator[Trial], **replaced: Callable) -> Check:
    """M5: true error over certificate and rounding; the tightness is the certificate over the true error."""
    worst, cases, tightness, sizes = 0.0, 0, [], []
    for trial in trials:
        verdict = judge(trial, **replaced)
        worst = max(worst, float((verdict.error / (verdict.bound + verdict.rounding)).max()))
        cases += verdict.error.size
        is_measurable = verdict.error > verdict.rounding
        tightness.append((verdict.bound / np.maximum(verdict.error, verdict.rounding))[is_measurable])
        sizes.append((verdict.bound / lengths(trial.values).max(axis=-1, keepdims=True)).ravel())
    low, median, high = np.quantile(np.concatenate(tightness), (0.1, 0.5, 0.9))
    note = (
        f"certificate / true error: median {median:.2f} (10 % below {low:.2f}, 10 % above {high:.2f}); "
        f"certificate / longest value: median {np.median(np.concatenate(sizes)):.2f}"
    )
    return Check("M5", "true error / certificate", cases, worst, 1, note)


def check_certificate(certify: Callable = certificate, measure: Callable = radii) -> Check:
    """M5 in 100,000 random trials."""
    return check_trials(random_trials(), certify=certify, measure=measure)


def check_certificate_on_real_keys(
    certify: Callable = certificate, measure: Callable = radii, *, model: str = MODEL
) -> Check:
    """M5 in every layer of `real_cache`, for the keep ratio of the demo and for gentle ones."""
    checks = [check_trials(real_trials(ratio, model), certify=certify, measure=measure) for ratio in KEEP_RATIOS]
    notes = (f"keep {ratio:g}: {check.note}" for ratio, check in zip(KEEP_RATIOS, checks, strict=True))
    worst, cases = max(check.worst for check in checks), sum(check.cases for check in checks)
    return Check("M5", checks[0].measured, cases, worst, 1, "\n".join((real_cache(model).title, *notes)))
