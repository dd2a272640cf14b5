"""What attends to which tokens: full attention, the package's recall, and what it is compared with.

A method serves one layer. It is given the layer's `Exact` keys and values, gets new tokens by `append`, and has
`attend(query)` and `attended(query)`, a mask (batch, kv_heads, tokens) of what that attends to. `query` is (batch,
kv_heads, group, dim), the new token's. `budget` counts all entries per KV head. Baselines attend to the new tokens, and
choose the rest of their budget by masks in plain torch: they are for their choices, not for their speed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kvcluster.fast import RecallCache, Selection

__all__ = ["Exact", "Full", "Pages", "Recall", "Ruled", "TopTokens", "best_above_mean"]


class Exact:
    """All keys and values of a layer: a context (kv_heads, tokens, dim) that all rows share, then each row's own."""

    def __init__(self, keys: Tensor, values: Tensor, batch: int) -> None:
        self.keys, self.values = keys, values
        self.new_keys = keys.new_empty(batch, len(keys), 0, keys.shape[-1])
        self.new_values = self.new_keys

    @property
    def n_context(self) -> int:
        return self.keys.shape[-2]

    @property
    def n_new(self) -> int:
        return self.new_keys.shape[-2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """New tokens (batch, kv_heads, tokens, dim)."""
        self.new_keys = torch.cat([self.new_keys, keys], dim=-2)
        self.new_values = torch.cat([self.new_values, values], dim=-2)

    def weights(self, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights (batch, kv_heads, group, tokens), only on what `mask` lets through."""
        logits = torch.cat([shared(query, self.keys.mT), query @ self.new_keys.mT], dim=-1) * query.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(-2), -torch.inf)
        return logits.softmax(dim=-1)

    def output(self, weights: Tensor) -> Tensor:
        """(batch, kv_heads, group, dim)"""
        old, new = weights.split([self.n_context, self.n_new], dim=-1)
        return shared(old, self.values) + new @ self.new_values


def shared(rows: Tensor, matrices: Tensor) -> Tensor:
    """`rows` (batch, kv_heads, group, n) times `matrices` (kv_heads, n, m), which are not copied for each batch row."""
    products = rows.transpose(0, 1).flatten(1, 2) @ matrices  # (kv_heads, batch * group, m)
    return products.unflatten(1, (len(rows), -1)).transpose(0, 1)


class Full:
    """All tokens; the base of the baselines, which say in `attended` what they leave out."""

    def __init__(self, exact: Exact) -> None:
        self.exact = exact

    def append(self, keys: Tensor, values: Tensor) -> None:
        """`exact` has them already."""

    def attended(self, query: Tensor) -> Tensor:
        return query.new_ones(*query.shape[:2], self.exact.n_context + self.exact.n_new, dtype=torch.bool)

    def attend(self, query: Tensor) -> Tensor:
        return self.exact.output(self.exact.weights(query, self.attended(query)))


class TopTokens(Full):
    """The ceiling: the context's tokens with the largest true weights, summed over the group."""

    def __init__(self, exact: Exact, budget: int) -> None:
        super().__init__(exact)
        self.budget = budget

    def attended(self, query: Tensor) -> Tensor:
        weights = self.exact.weights(query).sum(dim=-2)[..., : self.exact.n_context]
        top = weights.topk(min(self.budget - self.exact.n_new, self.exact.n_context), dim=-1).indices
        return with_new(torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, top, True), self.exact.n_new)


class Pages(Full):
    """Pages as Quest chooses them (arXiv:2406.10774): by the largest logit that a page could hold.

    The keys' least and greatest numbers in a page, feature by feature, bound each product `q_i * k_i`. A group shares
    one choice, by `combine`. The last page is trimmed to the budget, which the paper does not do. A context's last
    tokens that fill no page are attended to, like the new ones.
    """

    def __init__(self, exact: Exact, budget: int, combine: Callable[[Tensor], Tensor], page_size: int = 16) -> None:
        super().__init__(exact)
        self.budget, self.combine, self.page_size = budget, combine, page_size
        self.n_paged = exact.n_context // page_size * page_size
        pages = exact.keys[:, : self.n_paged].unflatten(1, (-1, page_size))  # (kv_heads, pages, page_size, dim)
        self.least, self.greatest = pages.amin(dim=2), pages.amax(dim=2)

    def attended(self, query: Tensor) -> Tensor:
        bounds = shared(query.clamp(min=0), self.greatest.mT) + shared(query.clamp(max=0), self.least.mT)
        place = ranks(self.combine(bounds)).unsqueeze(-1) * self.page_size + torch.arange(self.page_size)
        n_rest = self.exact.n_context - self.n_paged + self.exact.n_new
        return with_new(place.flatten(-2) < self.budget - n_rest, n_rest)


class Recall(Full):
    """The package's `RecallCache`, one row of its batch for each question."""

    def __init__(self, exact: Exact, cache: RecallCache) -> None:
        super().__init__(exact)
        self.cache = cache
        cache.append(exact.keys.unsqueeze(0), exact.values.unsqueeze(0))
        cache.select(torch.zeros(len(exact.new_keys), dtype=torch.int64))

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.cache.append(keys, values)

    def attend(self, query: Tensor) -> Tensor:
        return self.cache.attend(query)

    def attended(self, query: Tensor) -> Tensor:
        mask = super().attended(query)
        selection, n_sink = self.selection(query), self.cache.settings.n_sink
        if selection is not None:
            tokens = selection.tokens(self.cache.clusters)  # (batch, kv_heads, recalled)
            recalled = torch.zeros_like(mask[..., : self.cache.n_clustered + 1])  # -1, where a list ends, is the last
            recalled.scatter_(-1, tokens.where(tokens >= 0, self.cache.n_clustered), True)
            mask[..., n_sink : n_sink + self.cache.n_clustered] = recalled[..., :-1]
        return mask

    def selection(self, query: Tensor) -> Selection | None:
        return self.cache.select_clusters(query)


class Ruled(Recall):
    """The clusters of a `RecallCache`, ranked by another rule for the scores of a group.

    With a `mass` below 1 no more clusters are taken once those before have that share of the group's attention, as if
    every token had its centroid as key.
    """

    def __init__(
        self, exact: Exact, cache: RecallCache, combine: Callable[[Tensor], Tensor], mass: float = 1.0
    ) -> None:
        super().__init__(exact, cache)
        self.combine, self.mass = combine, mass

    def attend(self, query: Tensor) -> Tensor:
        return self.exact.output(self.exact.weights(query, self.attended(query)))

    def selection(self, query: Tensor) -> Selection:
        clusters, reach = self.cache.clusters, self.cache.settings.spread * query.abs()
        products = query @ clusters.centroids.mT
        rank = ranks(self.combine(products + reach @ self.cache.deviations.mT))
        budget = self.cache.settings.budget - (self.cache.n_seen - self.cache.n_clustered)
        taken = (budget - sum_before(clusters.counts, rank)).clamp(min=0).minimum(clusters.counts)
        if self.mass < 1:
            logits = products.double() * query.shape[-1] ** -0.5 + clusters.counts.double().log().unsqueeze(-2)
            shares = logits.softmax(dim=-1).mean(dim=-2)  # (batch, kv_heads, clusters)
            taken = torch.where(sum_before(shares, rank) < self.mass, taken, 0)
        return Selection(taken)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each number along the last axis, 0 for the highest; of equal numbers the first comes first."""
    ranking = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1]).expand_as(ranking)
    return torch.empty_like(ranking).scatter_(-1, ranking, places)


def sum_before(numbers: Tensor, rank: Tensor) -> Tensor:
    """For each number, the sum of those that rank before it."""
    ranked = torch.zeros_like(numbers).scatter_(-1, rank, numbers)
    return (ranked.cumsum(dim=-1) - ranked).gather(-1, rank)


def with_new(mask: Tensor, n_new: int) -> Tensor:
    """`mask` of old tokens, then the `n_new` ones that are always attended to."""
    return torch.cat([mask, mask.new_ones(*mask.shape[:-1], n_new)], dim=-1)


def best_above_mean(scores: Tensor) -> Tensor:
    """The package's rule for a group: the largest of scores (batch, kv_heads, group, clusters) less their means."""
    return (scores - scores.mean(dim=-1, keepdim=True)).amax(dim=-2)
