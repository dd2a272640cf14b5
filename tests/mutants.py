"""Wrong implementations: the fast path with one realistic mistake each. A conformance suite must catch every one."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from patches import Mutant, Patch, put, together
from torch import Tensor

from kvcluster import fast
from kvcluster.fast.exact.chunks import CompressedChunks, count_members
from kvcluster.fast.exact.mean import ordered_mean
from kvcluster.fast.exact.similarity import canonical_similarity, certified_matches, certified_top, halving_sum


def last_of_tied_destinations(right, sources, destinations):
    matches = right(sources, destinations.flip(1))
    return replace(matches, destination=destinations.shape[1] - 1 - matches.destination)


def last_of_tied_sources(right, matches, sources, destinations, n_top):
    best = fast.similarity(sources, destinations).amax(dim=-1)
    return best.shape[1] - 1 - best.flip(1).argsort(dim=-1, descending=True, stable=True)[:, :n_top]


def in_the_order_of_tome(right, destination, best_first, size, n_merged):
    """First what did not merge, then all destinations."""
    entry = right(destination, best_first, size, n_merged)
    is_odd = (torch.arange(size) % 2).expand_as(entry)
    is_destination = torch.zeros_like(entry[:, n_merged:]).scatter_reduce(-1, entry, is_odd, "amax")
    return is_destination.argsort(dim=-1, stable=True).argsort(dim=-1).gather(-1, entry)


def in_two_parts(right, keys, n_rest, of_rest, **parameters):
    """The last `n_rest` tokens are matched apart."""
    body, rest = keys.split([keys.shape[-2] - n_rest, n_rest], dim=-2)
    head, tail = right(body, **parameters), right(rest, **of_rest)
    labels = torch.cat([head.labels, head.counts.shape[-1] + tail.labels], dim=-1)
    return fast.Clustering(labels, torch.cat([head.counts, tail.counts], dim=-1))


def rest_as_a_chunk(right, keys, *, keep_ratio, chunk_size=64):
    n_rest = keys.shape[-2] % chunk_size
    of_rest = {"keep_ratio": keep_ratio, "chunk_size": max(1, n_rest)}
    return in_two_parts(right, keys, n_rest, of_rest, keep_ratio=keep_ratio, chunk_size=chunk_size)


def last_chunk_left_out(right, keys, **parameters):
    n_rest = min(keys.shape[-2], (keys.shape[-2] - 1) % parameters.get("chunk_size", 64) + 1)
    return in_two_parts(right, keys, n_rest, {"keep_ratio": 1}, **parameters)


def labels_of_the_first_head(right, keys, **parameters):
    made = right(keys, **parameters)
    if keys.ndim < 3:
        return made
    return fast.Clustering(*(x[..., :1, :].expand_as(x).contiguous() for x in (made.labels, made.counts)))


def score_by(score: Callable[[Tensor, Tensor], Tensor], *modules: str) -> Patch:
    """Another similarity, without the filter that is proved for the right one."""

    def never_safe(right, keys):
        return torch.zeros_like(keys, dtype=torch.float32), torch.zeros(keys.shape[:-1], dtype=torch.bool)

    return together(
        put(lambda right, a, b: score(a, b), *(f"{module}.canonical_similarity" for module in modules)),
        put(never_safe, *(f"{module}.normalized" for module in (*SCORES, "plain/kmeans"))),
    )


def dot_product(a, b):
    return halving_sum(a.double() * b.double())


def unguarded(a, b):
    return dot_product(a, b) * dot_product(a, b).abs() / (dot_product(a, a) * dot_product(b, b))


def float32_similarity(a, b):
    a, b = a.float(), b.float()
    dot, norms = (a * b).sum(-1), (a * a).sum(-1) * (b * b).sum(-1)
    return torch.where(norms == 0, 0.0, dot * dot.abs() / norms).double()


def minus_squared_distance(a, b):
    return 2 * dot_product(a, b) - dot_product(b, b)  # less |a|**2, which is the same for all clusters


def sum_in_float32(right, array, *of):
    labels, counts = of[-2:]
    sums = torch.zeros(*counts.shape, array.shape[-1])
    return sums.scatter_add_(-2, labels[..., None].expand_as(array), array.float()) / counts[..., None]


def means_of_means(right, keys, values=None, *, target):
    """Each round averages the entries of the round before, each with weight 1."""
    held, size = [array.float() for array in (keys, values) if array is not None], keys.shape[1]
    labels = torch.arange(size).expand(len(keys), size)
    while size > target:
        n_merged, pair = min(size // 2, size - target), (held[0][:, 0::2], held[0][:, 1::2])
        matches = certified_matches(*pair)
        merged = certified_top(matches, *pair, n_merged)
        entry = fast.exact.chunks.renumber(matches.destination, merged, size, n_merged)
        labels, size = entry.gather(-1, labels), size - n_merged
        held = [ordered_mean(array, entry, count_members(entry, size)) for array in held]
    return CompressedChunks(labels, count_members(labels, size), *(*held, None)[:2], 0, 0)


def round_between_rounds(monkeypatch):
    dtypes = []

    def noting_the_dtype(right, keys, values=None, *, target):
        dtypes.append(keys.dtype)
        return right(keys, values, target=target)

    put(noting_the_dtype, "plain/soft_matching.compress_together")(monkeypatch)
    put(lambda right, *of: right(*of).to(dtypes[-1]).float(), "plain/soft_matching.certified_mean")(monkeypatch)


def log_counts_by(log: Callable[..., Tensor]) -> Patch:
    without_cpp = put(lambda *_: "torch", "backends.choose", "recall_tokens.choose")
    return together(put(log, "plain/attention.log_counts"), without_cpp)


def query_heads_dealt_out(right, query, *others, **named):
    """Query head h goes to KV head h % heads, not h // group."""
    if query.ndim < 3:
        return right(query, *others, **named)
    *lead, heads, group, dim = query.shape
    output = right(query.reshape(*lead, group, heads, dim).transpose(-3, -2), *others, **named)
    return output.transpose(-3, -2).reshape(*lead, heads, group, -1)


def whole_chunks(held: fast.ClusteredCache, n_kept: int) -> int:
    """Tokens of whole chunks that are older than the last `n_kept`."""
    return max(0, held.n_seen - held.n_sink - held.n_clustered - n_kept) // held.chunk_size * held.chunk_size


def cluster_with(right, held, n_sink):
    true, rules = held.n_sink, held._rules
    held.n_sink, held._rules = n_sink, replace(rules, n_sink=n_sink)
    right(held)
    held.n_sink, held._rules = true, rules


def single_tokens_unclustered(right, held, keys, values):
    if keys.shape[-2] > 1:
        return right(held, keys, values)
    held.extend(keys, values)
    return held.keys, held.values, held.counts


def last_of_tied_clusters(right, opened, keys, centroids, labels):
    flipped = labels.clone()
    n_scored = right([(*at, is_open.flip(1)) for *at, is_open in opened], keys, centroids.flip(1), flipped)
    for *at, _ in opened:
        labels[tuple(at)] = centroids.shape[1] - 1 - flipped[tuple(at)]
    return n_scored


def assign_after_the_last_update(right, keys, first, max_iter, assign_to, means):
    made = right(keys, first, max_iter, assign_to, means)
    labels = assign_to(keys)(made.centroids)[0]
    return replace(made, labels=labels, counts=count_members(labels, first.shape[1]))


def begin_at_random(right, keys, *, n_clusters, init=None, **named):
    if init is None:
        chosen = torch.randperm(keys.shape[-2], generator=torch.Generator().manual_seed(0))[:n_clusters]
        init = chosen.sort().values.expand(*keys.shape[:-2], -1)
    return right(keys, n_clusters=n_clusters, init=init, **named)


def last_of_tied_scores(right, probe, clusters, counts, budget):
    backwards = replace(clusters, features=clusters.features.flip(1))
    return counts.shape[1] - 1 - right(probe, backwards, counts.flip(1), budget)


def taking_by(change: Callable[..., Tensor]) -> Patch:
    """`change` of what takes tokens of clusters, of the queries, the clusters, their counts and the budget."""
    return put(lambda right, *of: functools.partial(change, right(*of)), "selection.implementation")


def counting_by(change: Callable[[Tensor, int], Tensor]) -> Patch:
    """A step of the recall cache for which the counts of sinks, recent and recalled tokens are changed."""

    def attend(right, held, query, *, scale=None):
        keys, values, counts = held.entries(held.select_clusters(query))
        if held.n_clustered > 0:
            change(counts, held.settings.n_sink)
        if keys.ndim == query.ndim:
            return fast.clustered_attention(query, keys, values, counts, scale=scale)
        return fast.clustered_attention(query.unsqueeze(-2), keys, values, counts, scale=scale).squeeze(-2)

    return put(attend, "recall_cache.RecallCache.attend")


def budget_beside_sinks(right, held, **named):
    """As the paper counts."""
    right(held, **named)
    held.settings = replace(held.settings, budget=held.settings.budget + held.settings.n_sink)


def zero_is_none(right, settings, *of, **named):
    return right(replace(settings, prompt_segment_size=settings.prompt_segment_size or None), *of, **named)


def draw_by(change: Callable[..., dict[str, Tensor]]) -> Patch:
    """The sample at which k-means of a segment begins, drawn for other heads or starts."""

    def draw(right, *sizes, seed, heads, starts):
        return right(*sizes, seed=seed, **{"heads": heads, "starts": starts} | change(heads, starts))

    return put(draw, "memory/body_clusters.sample_tokens")


def always(**values) -> Patch:
    """A recall cache for which some settings are always the same."""

    def check(right, settings):
        for name, value in values.items():
            object.__setattr__(settings, name, value)
        right(settings)

    return put(check, "memory/segments.RecallSettings.__post_init__")


CACHE, RECALL_CACHE, KMEANS = ("ClusteredCache",), ("RecallCache",), ("kmeans", "RecallCache")
MATCH, MATCHING, MERGE = ("chunked_soft_matching",), ("chunked_soft_matching", *CACHE), ("merge", *CACHE)
SIMILARITY = ("similarity", *MATCHING, *KMEANS)
COUNTS = ("clustered_attention", "ClusteredCache", "recall_attention", "RecallCache")
ATTENTION = ("attention", "clustered_attention", "ClusteredCache")
SELECTION = ("select_clusters", "recall_attention")
RECALL = (*SELECTION, *RECALL_CACHE)

SCORES = "exact/similarity", "plain/assignment"  # modules
ALL_SCORES = "similarity", *SCORES
TARGET = "soft_matching.entries_of_chunk", "cache.entries_of_chunk"
MATCHES, TOP = "plain/soft_matching.certified_matches", "plain/soft_matching.certified_top"
PARTITION = ".alternating_partition", "exact/chunks.alternating_halves"
ORDERED = "exact/mean.ordered_mean"
MEANS = ORDERED, "plain/soft_matching.certified_mean"
ATTEND = "attention.attend_any", "clustered_attention.attend_any"
LEAVING, APPEND, CLUSTER = (f"cache.ClusteredCache.{name}" for name in ("_leaving", "append", "_cluster"))
UPDATE, LLOYD, SUM = "plain/kmeans.cluster_means", "exact/clusters.lloyd", "exact/similarity.halving_sum"
PROBE = "selection.make_probe", "memory/body_clusters.make_probe"
SCORED = "selection.score_clusters", "memory/body_clusters.score_clusters"

ODD_AS_SOURCES = together(
    put(lambda right, size: right(size)[::-1], *PARTITION),
    put(lambda right, even, odd: right(odd, even), MATCHES),
    put(lambda right, matches, even, odd, n_top: right(matches, odd, even, n_top), TOP),
)
SCALE_FORGOTTEN = put(lambda right, *of, **named: right(*of[:4], None, *of[5:], **named), *ATTEND)
TIED_SCORES = together(
    put(last_of_tied_scores, "plain/selection.certified_ranking"),
    put(lambda *_: "torch", "recall_tokens.choose"),  # C++ ranks by itself
)

MUTANTS = (
    Mutant("tied destinations: the last", MATCHING, put(last_of_tied_destinations, MATCHES)),
    Mutant("tied sources: the last", MATCHING, put(last_of_tied_sources, TOP)),
    Mutant("odd entries as sources", ("alternating_partition", *MATCHING), ODD_AS_SOURCES),
    Mutant("entries in another order", MATCHING, put(in_the_order_of_tome, "plain/soft_matching.renumber")),
    Mutant("a partial chunk is merged as well", MATCH, put(rest_as_a_chunk, ".chunked_soft_matching")),
    Mutant("the last whole chunk is left out", MATCH, put(last_chunk_left_out, ".chunked_soft_matching")),
    Mutant("one matching for all heads", MATCH, put(labels_of_the_first_head, ".chunked_soft_matching")),
    Mutant("only one round", MATCHING, put(lambda right, ratio, n: max(right(ratio, n), n - n // 2), *TARGET)),
    Mutant("target by floor", MATCHING, put(lambda _, ratio, size: max(1, int(ratio * size)), *TARGET)),
    Mutant("target in float32", MATCHING, put(lambda _, ratio, size: math.ceil(np.float32(ratio) * size), *TARGET)),
    Mutant("similarity: dot product", SIMILARITY, score_by(dot_product, *ALL_SCORES)),
    Mutant("similarity: float32", SIMILARITY, score_by(float32_similarity, *ALL_SCORES)),
    Mutant("similarity: no sign", SIMILARITY, score_by(lambda a, b: canonical_similarity(a, b).abs(), *ALL_SCORES)),
    Mutant("similarity: NaN of a zero key", SIMILARITY, score_by(unguarded, *ALL_SCORES)),
    Mutant("similarity: summed in order", SIMILARITY[:1], put(lambda _, x: x.cumsum(-1)[..., -1], SUM)),
    Mutant("filter without a margin", SIMILARITY[1:], put(lambda *_: 0.0, *(f"{module}.margin" for module in SCORES))),
    Mutant("sums in float32", ("merge", *MATCHING), put(sum_in_float32, *MEANS)),
    Mutant("sums in descending order", MERGE, put(lambda right, x, by, n: right(x.flip(-2), by.flip(-1), n), ORDERED)),
    Mutant("sums from +0.0", (*MERGE, *KMEANS), put(lambda right, x, *of: right(x + 0.0, *of), *MEANS, UPDATE)),
    Mutant("later merges forget the counts", MATCHING, put(means_of_means, "plain/soft_matching.compress_together")),
    Mutant("centroids rounded between rounds", MATCHING, round_between_rounds),
    Mutant("merge in the dtype", ("merge",), put(lambda right, x, by: right(x, by).to(x.dtype).float(), ".merge")),
    Mutant("log counts dropped", COUNTS, log_counts_by(lambda right, counts: right(counts.clamp(max=1)))),
    Mutant("log2 of the counts", COUNTS, log_counts_by(lambda right, counts: right(counts) / math.log(2))),
    Mutant("counts in float16", COUNTS[:1], log_counts_by(lambda right, counts: right(counts.half()))),
    Mutant("query heads dealt out", ATTENTION, put(query_heads_dealt_out, *ATTEND)),
    Mutant("explicit scale forgotten", ATTENTION, SCALE_FORGOTTEN),
    Mutant("cache: recent tokens are clustered", CACHE, put(lambda _, held: whole_chunks(held, 0), LEAVING)),
    Mutant("cache: a token late", CACHE, put(lambda _, held: whole_chunks(held, held.n_recent + 1), LEAVING)),
    Mutant("cache: one chunk an append", CACHE, put(lambda right, held: min(held.chunk_size, right(held)), LEAVING)),
    Mutant("cache: single tokens are not clustered", CACHE, put(single_tokens_unclustered, APPEND)),
    Mutant(
        "cache: append returns what is left",
        CACHE,
        put(lambda right, held, *new: right(held, *new) and (held.keys, held.values, held.counts), APPEND),
    ),
    Mutant(
        "cache: chunks shifted by the sinks",
        CACHE,
        put(lambda right, held: cluster_with(right, held, held.n_sink + -held.n_sink % held.chunk_size), CLUSTER),
    ),
    Mutant("cache: sinks are clustered", CACHE, put(lambda right, held: cluster_with(right, held, 0), CLUSTER)),
    Mutant("empty clusters become 0", KMEANS, put(lambda right, x, by, c, *of: right(x, by, 0 * c.abs(), *of), UPDATE)),
    Mutant(
        "k-means: a round too few", KMEANS, put(lambda right, x, at, n, *by: right(x, at, max(1, n - 1), *by), LLOYD)
    ),
    Mutant("k-means: assigns after the last update", KMEANS, put(assign_after_the_last_update, LLOYD)),
    Mutant("k-means: begins at random tokens", KMEANS[:1], put(begin_at_random, ".kmeans")),
    Mutant("k-means: ties to the last cluster", KMEANS, put(last_of_tied_clusters, "plain/assignment.settle")),
    Mutant("k-means: Euclidean distance", KMEANS, score_by(minus_squared_distance, "plain/assignment")),
    Mutant("recall: one query of the group", RECALL, put(lambda right, query, by: right(query[:, :1], by), *PROBE)),
    Mutant("recall: no deviations", RECALL, put(lambda right, query, by: right(query, 0), *PROBE)),
    Mutant("recall: no mean", RECALL, put(lambda right, *of: replace(right(*of), mean=0 * right(*of).mean), *SCORED)),
    Mutant("recall: ties to the last cluster", RECALL, TIED_SCORES),
    Mutant("budget off by one", SELECTION, taking_by(lambda take, *of: take(*of[:-1], of[-1] + 1))),
    Mutant("recall: not trimmed", SELECTION, taking_by(lambda take, q, of, n, most: (take(q, of, n, most) > 0) * n)),
    Mutant("recall cache: no sinks", RECALL_CACHE, counting_by(lambda counts, n_sink: counts[..., :n_sink].zero_())),
    Mutant("recall cache: a token twice", RECALL_CACHE, counting_by(lambda counts, n: counts[..., n : n + 1].mul_(2))),
    Mutant("recall cache: sinks on top", RECALL_CACHE, put(budget_beside_sinks, "recall_cache.RecallCache.__init__")),
    Mutant("recall cache: zero is None", RECALL_CACHE, put(zero_is_none, "memory/segments.RecallSettings.sizes")),
    Mutant("recall cache: no sample", RECALL_CACHE, always(init_seed=None)),
    Mutant("recall cache: one sample for all heads", RECALL_CACHE, draw_by(lambda heads, _: {"heads": 0 * heads})),
    Mutant("recall cache: one sample for all segments", RECALL_CACHE, draw_by(lambda _, at: {"starts": 0 * at})),
    Mutant("recall cache: the group recalls together", RECALL_CACHE, always(is_per_query_head=False)),
    Mutant("recall cache: all tokens in the budget", RECALL_CACHE, always(is_exact_counted=True)),
)
