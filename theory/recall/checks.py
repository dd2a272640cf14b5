"""Checks of the claims R1 to R4 of README.md: what a budget of recalled tokens guarantees."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvcluster.reference import Clustering, Selection, attention, recall_attention, select_clusters
from kvcluster.reference.attention import scaled_logits, softmax
from kvcluster.reference.kmeans import Clusters, kmeans
from kvcluster.reference.recall import mean_deviations, mean_of_members, recalled_entries

from ..claims import Check
from ..merging.certificate import certificate, most_mass, radii
from ..merging.rounding import attention_rounding, lengths
from ..real_cache import MODEL, N_QUERIES, real_cache

__all__ = ["check_greedy", "check_left_out", "check_mass", "check_stand_ins"]


@dataclass(frozen=True, eq=False)
class Recalled:
    """One recall: a group's queries (problems, group, dim), all tokens, their clusters, a budget, and who was taken."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    clusters: Clusters
    budget: int

    @property
    def scale(self) -> float:
        return self.keys.shape[-1] ** -0.5

    @property
    def taken(self) -> np.ndarray:
        """Whether a token is recalled, (problems, tokens)."""
        tokens = self.selection.tokens(self.clusters)
        return (tokens[..., None] == np.arange(self.keys.shape[-2])).any(axis=-2)

    @property
    def selection(self) -> Selection:
        return select_clusters(
            self.query,
            self.clusters.centroids,
            self.clusters.counts,
            budget=self.budget,
            deviations=mean_deviations(self.keys, self.clusters),
        )


@functools.cache
def recalls(model: str = MODEL) -> tuple[Recalled, ...]:
    """Random keys in and around clusters, then a real model's of 6 layers, if it has so many; several budgets."""
    caches = []
    rng = np.random.default_rng(8)
    for problems, group, tokens, dim, spread in ((20, 1, 40, 8, 0.3), (20, 3, 60, 16, 1.0), (10, 2, 33, 2, 0.05)):
        centres = 2 * rng.standard_normal((problems, 5, dim))
        keys = centres[:, rng.integers(0, 5, tokens)] + spread * rng.standard_normal((problems, tokens, dim))
        values = rng.standard_normal((problems, tokens, dim)).astype(np.float32)
        query = (2 * rng.standard_normal((problems, group, dim))).astype(np.float32)
        keys = keys.astype(np.float32)
        clusters = kmeans(keys, n_clusters=6)
        for budget in (1, 7, tokens // 2, tokens):
            caches.append(Recalled(query, keys, values, clusters, budget))
    cache = real_cache(model)
    for layer in range(0, len(cache.keys), -(-len(cache.keys) // 6)):  # every fifth of 30
        keys, values = cache.keys[layer], cache.values[layer]
        clusters = kmeans(keys, n_clusters=keys.shape[-2] // 20, max_iter=3)
        query = np.ascontiguousarray(cache.queries[layer][:, ::N_QUERIES])  # the group's heads, for the next token
        for budget in (64, 128):
            caches.append(Recalled(query, keys, values, clusters, budget))
    return tuple(caches)


def left_out(weights: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Attention that the tokens not taken have in full attention, (problems, group)."""
    return np.where(taken[:, None], 0, weights).sum(axis=-1)


def farthest(rows: np.ndarray, others: np.ndarray) -> float:
    """Largest distance of a row of `rows` to one of `others`; 0 if there are none."""
    return float(lengths(rows[:, None].astype(np.float64) - others[None]).max(initial=0))


def check_left_out(share: Callable[[np.ndarray, np.ndarray], np.ndarray] = left_out, *, model: str = MODEL) -> Check:
    """R1: error over mass left out times the distance of the values, and rounding."""
    worst, cases, errors, masses = 0.0, 0, [], []
    for recall in recalls(model):
        full = recall.query, recall.keys, recall.values
        weights, taken = softmax(scaled_logits(recall.query, recall.keys, recall.scale)), recall.taken
        ours = recall_attention(*full, recall.clusters, budget=recall.budget)
        error = lengths(attention(*full) - ours)
        apart = np.array(
            [
                farthest(values[is_taken], values[~is_taken])
                for values, is_taken in zip(recall.values, taken, strict=True)
            ]
        )
        mass = share(weights, taken)
        bound = mass * apart[:, None] + 2 * attention_rounding(*full, scale=recall.scale)
        worst, cases = max(worst, float((error / bound).max())), cases + error.size
        if recall.keys.shape[-2] > 100 and recall.budget == 64:
            errors.append(error / lengths(recall.values).max(axis=-1)[:, None])
            masses.append(mass)
    note = (
        f"{real_cache(model).title}, 64 of 512 tokens: median mass left out {np.median(np.concatenate(masses)):.3f}, "
        f"median error / longest value {np.median(np.concatenate(errors)):.3f}"
    )
    return Check("R1", "error / bound", cases, worst, 1, note)


def most_left_out(recall: Recalled) -> np.ndarray:
    """R2: the share that tokens not taken can have at most, from centroids and radii alone, (problems, group)."""
    clusters, scale = recall.clusters, recall.scale
    rest = Clustering(np.where(recall.taken, -1, clusters.labels), clusters.counts)
    value_centroids = mean_of_members(recall.values, clusters)
    held = radii(recall.keys, recall.values, rest, clusters.centroids, value_centroids)
    size = scale * lengths(recall.query)[..., None]
    radius, shift = size * held.keys[:, None], size * held.key_shifts[:, None]
    counts = clusters.counts - recall.selection.taken
    logits = scaled_logits(recall.query, recall.keys, scale)
    highest = logits.max(axis=-1, keepdims=True)
    taken = np.where(recall.taken[:, None], np.exp(logits - highest), 0).sum(axis=-1)
    most_of_rest = (
        counts[:, None]
        * np.exp(scaled_logits(recall.query, clusters.centroids, scale) - highest)
        * most_mass(radius, shift)
    ).sum(axis=-1)
    return most_of_rest / (taken + most_of_rest)


def check_mass(most: Callable[[Recalled], np.ndarray] = most_left_out, *, model: str = MODEL) -> Check:
    """R2: mass left out over what the radii allow."""
    worst, cases, ratios = 0.0, 0, []
    for recall in recalls(model):
        mass = left_out(softmax(scaled_logits(recall.query, recall.keys, recall.scale)), recall.taken)
        bound = most(recall)
        rounding = attention_rounding(recall.query, recall.keys, np.ones((len(recall.keys), 1, 1)), scale=recall.scale)
        worst, cases = max(worst, float((mass / (bound + 4 * rounding)).max())), cases + mass.size
        ratios.append((bound / np.maximum(mass, 1e-300))[mass > 1e-9])
    note = f"allowed / true mass left out: median {np.median(np.concatenate(ratios)):.2f}"
    return Check("R2", "mass left out / allowed", cases, worst, 1, note)


def check_stand_ins(certify: Callable = certificate, *, model: str = MODEL) -> Check:
    """R3: error with centroids for the rest over the certificate; and beside the error without them."""
    worst, cases = 0.0, 0
    gains: dict[bool, list[np.ndarray]] = {False: [], True: []}  # at random, in the real model
    for recall in recalls(model):
        full = recall.query, recall.keys, recall.values
        ours = recall_attention(*full, recall.clusters, budget=recall.budget, centroids_for_rest=True)
        error = lengths(attention(*full) - ours)
        value_centroids = mean_of_members(recall.values, recall.clusters)
        keys, values, counts = recalled_entries(
            recall.keys, recall.values, recall.clusters, recall.selection, value_centroids
        )
        first = keys.shape[-2] - recall.clusters.counts.shape[-1]  # exact tokens, then centroids
        rest = Clustering(np.where(recall.taken, -1, first + recall.clusters.labels), counts)
        held = radii(recall.keys, recall.values, rest, keys, values)
        shift = recall.scale * lengths(recall.query) * held.key_shifts.max(axis=-1, keepdims=True)
        stored = recall.query, keys, values, counts
        rounding = attention_rounding(*full, scale=recall.scale)
        rounding += 3 * np.exp(shift) * attention_rounding(*stored, scale=recall.scale)
        bound = certify(*stored, held, scale=recall.scale)
        worst, cases = max(worst, float((error / (bound + rounding)).max())), cases + error.size
        without = lengths(attention(*full) - recall_attention(*full, recall.clusters, budget=recall.budget))
        gains[recall.keys.shape[-2] > 100].append((error / np.maximum(without, 1e-12)).ravel())
    note = (
        f"error with centroids / without: median {np.median(np.concatenate(gains[False])):.2f} at random, "
        f"{np.median(np.concatenate(gains[True])):.2f} in {real_cache(model).title}"
    )
    return Check("R3", "true error / certificate", cases, worst, 1, note)


def take_by_score(query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, budget: int) -> np.ndarray:
    return select_clusters(query, centroids, counts, budget=budget).taken


def check_greedy(take: Callable = take_by_score) -> Check:
    """R4: estimated mass of what is taken, beside every other way to spend the budget on 4 clusters."""
    rng = np.random.default_rng(9)
    worst, cases = 0.0, 0
    for _ in range(60):
        query = rng.standard_normal((1, 3)).astype(np.float32)
        centroids = rng.standard_normal((4, 3)).astype(np.float32)
        counts, budget = rng.integers(0, 5, 4), int(rng.integers(0, 12))
        per_token = np.exp(scaled_logits(query, centroids, 1.0)[0])
        ways = np.array(list(itertools.product(*(range(n + 1) for n in counts))))
        ways = ways[ways.sum(axis=1) <= budget]
        taken = take(query, centroids, counts, budget)
        best = float((ways @ per_token).max())
        ours = float(taken @ per_token) if taken.sum() <= budget and (taken <= counts).all() else 0.0
        worst, cases = max(worst, (best - ours) / max(best, 1.0)), cases + len(ways)
    return Check("R4", "estimated mass above ours, relative", cases, worst, 2.0**-45)
