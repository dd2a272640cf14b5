"""The recall cache: all tokens are kept and clustered as they arrive, few are attended to (ClusterKV)."""

import math

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from .arguments import check_append, check_attention, check_half_range, check_integer, check_seed, check_share
from .clustered_attention import clustered_attention
from .kmeans import Clusters, kmeans
from .quantization import GROUP, check_bits_of_entries, dequantize, quantize, within_range
from .recall import mean_deviations, mean_of_members, recalled_entries, round_to_bfloat16
from .sampling import sample_tokens
from .segments import SegmentPlan
from .selection import Selection, select_clusters
from .whole_changes import whole_or_not

__all__ = ["RecallCache"]


class RecallCache:
    """A key-value cache that forgets nothing and attends to at most `budget` tokens per KV head.

    Always attended to, exactly: the first `n_sink` tokens (sinks) and the last ones (recent). The tokens between (body)
    are clustered, segment by segment, and each query recalls whole clusters of them.

    Parameters
    ----------
    budget : tokens attended to per KV head, sinks and recent tokens included; at least
        `n_sink + n_recent + segment_size`.
    n_sink : first tokens that are never clustered, at least 0.
    n_recent : last tokens that are not clustered, at least 0. With 1, the newest token always attends to itself.
    tokens_per_cluster : a segment of n tokens becomes `ceil(n / tokens_per_cluster)` clusters.
    segment_size : tokens that are clustered together, alone and once, as soon as that many are older than the
        `n_recent` last; by default 320, or half of what the budget leaves beside `n_sink` and `n_recent` if less.
    prompt_segment_size : the first append, except for sinks and `n_recent` tokens, is clustered at once, in segments of
        this size, the last of which may be shorter. None: in one segment. 0: it is clustered like any other append.
    max_iter, is_centred : as in `kmeans`.
    spread : as in `select_clusters`.
    centroids_for_rest : as in `recall_attention`.
    init_seed : the `init` of `kmeans` is a random sample of the segment's tokens, see `sample_tokens`; from 0 to
        2**32 - 1. None: evenly spaced tokens.
    is_per_query_head : each query head of a group recalls with a budget of its own; else the group does together.
    is_exact_counted : sinks and recent tokens count in the budget. If not, `budget` tokens are recalled beside them;
        it need only be 1 then, and `segment_size` is 320 by default.
    bits : of the numbers of the body, 8, 4, 3 or 2, or a pair of these for keys and for values: a token is quantized
        alone, as it is recalled, when its segment has been clustered. 16: all stays as it is.

    Attributes
    ----------
    keys, values : (..., n_seen, dim) and (..., n_seen, dim_value), in the order of arrival; None at first. With `bits`
        those of the body are as they are read back, rounded to the dtype of the cache.
    clusters : of the body; labels continue from segment to segment. None while there is no body.
    deviations : (..., clusters, dim), float32: see `mean_deviations`. These and the centroids are rounded to bfloat16,
        which halves what a faster implementation reads to select.
    n_seen, n_stored : tokens appended so far, all of which are held.
    n_clustered : of these, the tokens of the body: positions `n_sink` to `n_sink + n_clustered - 1`.
    nbytes : bytes of keys, values and clusters.

    Notes
    -----
    With `prompt_segment_size=0` segments lie at absolute positions and the cache does not depend on how the tokens
    arrived: a prompt at once, token by token or any split gives the same bytes. With any value but None, building
    it is linear in the number of tokens.

    From the paper (arXiv:2412.03213, DAC 2025): 16 sinks; a prompt of L tokens in L / 80 clusters; every 320 generated
    tokens clustered alone into 4 new clusters, older ones never changed. `as_published` has all its settings. The
    defaults are our choice. Source: docs/papers.md, ClusterKV: budget.

    Examples
    --------
    Twelve tokens: one sink, two segments of four tokens in two clusters each, three recent tokens.

    >>> cache = RecallCache(budget=9, n_sink=1, tokens_per_cluster=2, segment_size=4, prompt_segment_size=0)
    >>> tokens = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    >>> cache.append(tokens, tokens)
    >>> cache.n_seen, cache.n_clustered, cache.clusters.counts
    (12, 8, array([2, 2, 2, 2]))
    >>> cache.select_clusters(tokens[:1])
    Selection(taken=array([2, 2, 0, 1]))
    """

    def __init__(
        self,
        *,
        budget: int,
        n_sink: int = 16,
        n_recent: int = 1,
        tokens_per_cluster: int = 8,
        segment_size: int | None = None,
        prompt_segment_size: int | None = 512,
        max_iter: int = 4,
        is_centred: bool = False,
        spread: float = 0.5,
        centroids_for_rest: bool = False,
        init_seed: int | None = None,
        is_per_query_head: bool = False,
        is_exact_counted: bool = True,
        bits: int | tuple[int, int] = 16,
    ) -> None:
        sizes = budget, n_sink, n_recent, tokens_per_cluster, segment_size, prompt_segment_size
        self.plan = SegmentPlan(*sizes, is_exact_counted)
        self.max_iter = check_integer("max_iter", max_iter, least=1)
        self.spread = check_share("spread", spread)
        self.init_seed = None if init_seed is None else check_seed("init_seed", init_seed)
        self.bits = check_bits_of_entries(bits, chunk_size=1)
        self.is_centred, self.is_per_query_head = is_centred, is_per_query_head
        self.centroids_for_rest = centroids_for_rest
        self.keys: Float[np.ndarray, "*lead tokens dim"] | None = None
        self.values: Float[np.ndarray, "*lead tokens dim_value"] | None = None
        self.clusters: Clusters | None = None
        self.deviations: Float32[np.ndarray, "*lead clusters dim"] | None = None
        self.n_seen = 0
        self.n_clustered = 0

    @classmethod
    def as_published(cls, *, budget: int, seed: int = 0) -> "RecallCache":
        """An empty cache with the settings of the paper (arXiv:2412.03213, DAC 2025), for measurements beside ours.

        Parameters
        ----------
        budget : tokens recalled per query head, at least 1. As in the paper, sinks and tokens that wait for a cluster,
            at most 16 + 320, are attended to beside them and are not counted.
        seed : `init_seed`.

        Notes
        -----
        Stated there: 16 sinks, a prompt of L tokens in L / 80 clusters, 320 generated tokens at a time in 4 more, a
        random sample as first centroids, rounds until the labels repeat, scores `q . centroid`. Reported of its code:
        selection per query head. Our choices: `ceil((L - 16) / 80)`; no recent tokens but those that wait;
        `max_iter=1000`, which only rounds that never repeat would reach. docs/papers.md has it row by row, with what a
        whole model adds.
        """
        return cls(
            budget=budget,
            n_recent=0,
            tokens_per_cluster=80,
            segment_size=320,
            prompt_segment_size=None,
            max_iter=1000,
            spread=0.0,
            init_seed=seed,
            is_per_query_head=True,
            is_exact_counted=False,
        )

    @property
    def n_stored(self) -> int:
        return self.n_seen

    @property
    def nbytes(self) -> int:
        arrays = [self.keys, self.values, self.deviations]
        if self.clusters is not None:
            arrays += [self.clusters.labels, self.clusters.counts, self.clusters.centroids]
        saved = 0
        for array, bits in zip((self.keys, self.values), self.bits or (), strict=False):
            of_token = array.shape[-1] * array.itemsize - math.ceil(array.shape[-1] / GROUP) * 4 * (bits + 1)
            saved += math.prod(array.shape[:-2]) * self.n_clustered * of_token
        return sum(array.nbytes for array in arrays if array is not None) - saved

    @whole_or_not
    def append(
        self, keys: Float[np.ndarray, "*lead tokens dim"], values: Float[np.ndarray, "*lead tokens dim_value"]
    ) -> None:
        """Take the next tokens, then cluster every segment that is due.

        Parameters
        ----------
        keys, values : (..., tokens, dim) and (..., tokens, dim_value), any number of tokens; leading axes, dims and
            dtype as in the first append.

        Raises
        ------
        ValueError : wrong dtype or shape, NaN or infinity; with `is_centred`, keys above half of the largest float32
            number, which might overflow when their mean is subtracted; with `bits`, values too. It is then as it was.
        """
        check_append(keys, values, (self.keys, self.values))
        if self.is_centred:
            check_half_range("keys", keys, "with is_centred")
        if self.bits is not None:
            check_half_range("keys", keys, "to be quantized")
            check_half_range("values", values, "to be quantized")
        is_first = self.n_seen == 0
        if self.keys is None:
            self.keys, self.values = keys.copy(), values.copy()
        else:
            self.keys = np.concatenate([self.keys, keys], axis=-2)  # (..., tokens, dim)
            self.values = np.concatenate([self.values, values], axis=-2)
        self.n_seen += keys.shape[-2]
        leaving = max(0, self.n_seen - self.plan.n_sink - self.n_clustered - self.plan.n_recent)
        for size in self.plan.sizes(leaving, is_first=is_first):
            self._cluster_next(size)

    def _cluster_next(self, size: int) -> None:
        """Cluster the next `size` tokens of the body, alone."""
        start = self.plan.n_sink + self.n_clustered
        keys = self.keys[..., start : start + size, :]
        n_clusters = self.plan.n_clusters(size)
        init = None if self.init_seed is None else self._sample(keys, n_clusters)
        fitted = kmeans(keys, n_clusters=n_clusters, init=init, max_iter=self.max_iter, is_centred=self.is_centred)
        deviations = round_to_bfloat16(mean_deviations(keys, fitted))
        self._quantize(start, size)
        new = Clusters(fitted.labels, fitted.counts, round_to_bfloat16(fitted.centroids))
        self.n_clustered += size
        if self.clusters is None:
            self.clusters, self.deviations = new, deviations
            return
        old = self.clusters
        self.clusters = Clusters(
            np.concatenate([old.labels, new.labels + old.counts.shape[-1]], axis=-1),
            np.concatenate([old.counts, new.counts], axis=-1),
            np.concatenate([old.centroids, new.centroids], axis=-2),
        )
        self.deviations = np.concatenate([self.deviations, deviations], axis=-2)

    def _quantize(self, start: int, size: int) -> None:
        """With `bits`, put in the place of tokens what is read back of them."""
        for array, bits in zip((self.keys, self.values), self.bits or (), strict=False):
            tokens = array[..., start : start + size, :]
            read = dequantize(quantize(tokens, bits=bits), tokens.shape[-1])
            tokens[...] = within_range(read, tokens.dtype)

    def _sample(self, keys: np.ndarray, n_clusters: int) -> Int64[np.ndarray, "*lead n_clusters"]:
        """Where k-means of a segment's keys begins: the last leading index is the head, the others draw alike."""
        *lead, size, _ = keys.shape
        heads = range(lead[-1] if lead else 1)
        drawn = [sample_tokens(size, n_clusters, seed=self.init_seed, head=i, start=self.n_clustered) for i in heads]
        of_heads = np.array(drawn, dtype=np.int64).reshape(*lead[-1:], n_clusters)
        return np.broadcast_to(of_heads, (*lead, n_clusters))

    def select_clusters(self, query: Float[np.ndarray, "*lead group dim"]) -> Selection | None:
        """What `query` recalls with the budget that sinks and recent tokens leave; None while there is no body.

        With `is_per_query_head`, `taken` is (..., group, clusters).
        """
        self._check_query(query)
        if self.clusters is None:
            return None
        centroids, counts, deviations = self.clusters.centroids, self.clusters.counts, self.deviations
        if self.is_per_query_head:
            centroids, counts, deviations = self._for_query_heads(query.shape[-2], centroids, counts, deviations)
            query = query[..., None, :]  # (..., group, 1, dim)
        budget = self.plan.budget_of_body(self.n_seen - self.n_clustered)
        return select_clusters(query, centroids, counts, budget=budget, deviations=deviations, spread=self.spread)

    def attend(
        self, query: Float[np.ndarray, "*lead group dim"], *, scale: float | None = None
    ) -> Float64[np.ndarray, "*lead group dim_value"]:
        """Attention of a group's query heads (..., group, dim) to sinks, recalled and recent tokens.

        Raises
        ------
        ValueError : nothing appended yet; else as `select_clusters`.
        """
        selection = self.select_clusters(query)
        if selection is None or not self.is_per_query_head:
            return clustered_attention(query, *self.entries(selection), scale=scale)
        return clustered_attention(query[..., None, :], *self.entries(selection), scale=scale)[..., 0, :]

    def entries(self, selection: Selection | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, values and counts of what is attended to: sinks, recent tokens, then what `recalled_entries` gives.

        They have the leading axes of `selection`, so with `is_per_query_head` those of each query head.
        """
        n_sink, keys, values, clusters = self.plan.n_sink, self.keys, self.values, self.clusters
        if self.is_per_query_head and selection is not None:
            group = selection.taken.shape[-2]
            keys, values = self._for_query_heads(group, keys, values)
            clusters = Clusters(*self._for_query_heads(group, clusters.labels, clusters.counts, clusters.centroids))
        body = slice(n_sink, n_sink + self.n_clustered)
        exact = np.r_[: min(n_sink, self.n_seen), body.stop : max(body.stop, self.n_seen)]
        entries = (
            keys[..., exact, :],
            values[..., exact, :],
            np.ones((*keys.shape[:-2], len(exact)), int),
        )
        if selection is None:
            return entries
        keys, values = keys[..., body, :], values[..., body, :]
        value_centroids = mean_of_members(values, clusters) if self.centroids_for_rest else None
        recalled = recalled_entries(keys, values, clusters, selection, value_centroids)
        pairs = zip(entries, recalled, (-2, -2, -1), strict=True)
        keys, values, counts = (np.concatenate([a.astype(b.dtype), b], axis=axis) for a, b, axis in pairs)
        return keys, values, counts

    def _for_query_heads(self, group: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Arrays of KV heads (..., .) as arrays of their query heads (..., group, .)."""
        axis = self.keys.ndim - 2
        return tuple(np.repeat(np.expand_dims(array, axis), group, axis=axis) for array in arrays)

    def _check_query(self, query: np.ndarray) -> None:
        if self.keys is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        check_attention(query, self.keys, self.values)
        if query.shape[-2] == 0:
            raise ValueError(f"query must not be empty, got {query.shape}")
