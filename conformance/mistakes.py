"""Mistakes that implementations make, each as a change of the reference: what explains a wrong outcome has its cause.

If the reference with a mistake gives what an implementation gave in most cases that failed, that is what went wrong
there. Those of distinctive matching and of budgets are in `own_mistakes`.
"""

import numpy as np

from kvcluster.reference.agreement import EPS, attention_agreement

from . import wrong_parts as wrong
from .case import Case
from .comparing import oracle_arguments
from .implementation import Outcome
from .mistake import Mistake
from .own_mistakes import OWN_MISTAKES
from .wrong_parts import Patch

__all__ = ["MISTAKES", "explain"]

MATCHING = ("chunked_soft_matching", "ClusteredCache")
ATTENTION = ("attention", "clustered_attention", "recall_attention", "ClusteredCache", "RecallCache")
CENTROIDS = ("merge", "ClusteredCache", "chunked_soft_matching")
SELECTION = ("select_clusters", "recall_attention", "RecallCache")
KMEANS = ("kmeans", "RecallCache")


def explain(failures: list[tuple[Case, Outcome]]) -> Mistake | None:
    """The mistake that gives most of these outcomes, all of one operation; None if none gives more than half."""
    most, best = len(failures) // 2, None
    for mistake in MISTAKES:
        if failures[0][0].operation in mistake.operations:
            given = sum(gives(mistake, *failure) for failure in failures)
            if given > most:
                most, best = given, mistake
    return best


def gives(mistake: Mistake, case: Case, outcome: Outcome) -> bool:
    """Whether the mistake has this outcome, in all that can be compared."""
    made = mistake.outcome(case)
    if made.error is not None or outcome.error is not None:
        return False
    shared = [name for name in outcome.arrays if name in made.arrays]
    return all(is_alike(case, name, outcome.arrays[name], made.arrays[name]) for name in shared)


def is_alike(case: Case, name: str, mine: np.ndarray, made: np.ndarray) -> bool:
    """Equal, or of attention outputs: no farther apart than two right ones may be."""
    if mine.shape != made.shape:
        return False
    if name != "output":
        return bool(np.array_equal(mine, made)) and np.signbit(mine).tolist() == np.signbit(made).tolist()
    query, keys, values, counts, scale = oracle_arguments(case)
    bound = attention_agreement(np.zeros(made.shape, query.dtype), query, keys, values, counts, scale=scale).bound
    bound = bound + 2 * EPS[query.dtype.name] * np.abs(made).max(axis=(-2, -1))  # larger outputs are rounded by more
    return bool((np.abs(mine.astype(np.float64) - made).max(axis=(-2, -1)) <= bound).all())


def in_matching(name: str, part: object) -> tuple[Patch, ...]:
    return (("soft_matching", name, part),)


def for_similarity(part: object) -> tuple[Patch, ...]:
    return tuple((place, "similarity", part) for place in ("soft_matching", "distinctive_matching", "kmeans", ""))


SIMILAR = ("similarity", *MATCHING, "distinctive_matching", *KMEANS)
MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "sources and destinations are swapped: even entries are sources, odd ones destinations",
        "3.1",
        ("alternating_partition", *MATCHING),
        tuple((place, "alternating_partition", wrong.swapped_partition) for place in ("", "soft_matching")),
    ),
    Mistake(
        "ties between destinations go to the largest index: of equal similarities the smallest index wins",
        "5.4",
        MATCHING,
        in_matching("match_round", wrong.wrong_round(last_destination=True)),
    ),
    Mistake(
        "ties between sources go to the largest index: of equal matches those of the smallest index merge",
        "5.5",
        MATCHING,
        in_matching("match_round", wrong.wrong_round(last_source=True)),
    ),
    Mistake(
        "entries change their order: those that stay keep it, whether source or destination",
        "5.6",
        MATCHING,
        in_matching("match_round", wrong.wrong_round(is_reordered=True)),
    ),
    Mistake(
        "similarities are computed in float32: near ties need float64 and halving sums",
        "2.1",
        SIMILAR,
        for_similarity(wrong.similarity_in_float32),
    ),
    Mistake(
        "similarities are dot products: they must be divided by both squared norms",
        "4.1",
        SIMILAR,
        for_similarity(wrong.dot_product),
    ),
    Mistake("similarities have lost their sign: it is dot * |dot|", "4.2", SIMILAR, for_similarity(wrong.without_sign)),
    Mistake(
        "similarities are cosines: they must be signed squares of cosines, without a square root",
        "4.1",
        SIMILAR,
        for_similarity(wrong.cosine),
    ),
    Mistake("similarities are Euclidean distances, not cosines", "4.1", SIMILAR, for_similarity(wrong.euclidean)),
    Mistake(
        "the target is rounded down: it is ceil(keep_ratio * chunk_size)",
        "5.1",
        (*MATCHING, "distinctive_matching"),
        tuple((place, "entries_of_chunk", wrong.rounded_down) for place in ("soft_matching", "distinctive_matching")),
    ),
    Mistake(
        "there is one round only: rounds go on until the target is reached",
        "5.3",
        MATCHING,
        change=wrong.one_round,
    ),
    Mistake(
        "all leading indices share one matching: each is its own problem",
        "1.1",
        MATCHING,
        tuple((place, "chunked_soft_matching", wrong.of_first_head) for place in ("", "cache")),
    ),
    Mistake(
        "later rounds average centroids without their counts: a centroid is the mean of its original tokens",
        "5.7",
        MATCHING,
        in_matching("match_chunk", wrong.rounds_with(wrong.mean_of_centroids)),
    ),
    Mistake(
        "centroids between rounds are rounded to the dtype of the keys: they go on in float32",
        "5.7",
        MATCHING,
        in_matching("match_chunk", wrong.rounds_with(wrong.rounded_to_dtype)),
    ),
    Mistake(
        "the trailing partial chunk is clustered: it must stay as it is",
        "5.2",
        ("chunked_soft_matching",),
        (("", "chunked_soft_matching", wrong.with_partial_chunk),),
    ),
    Mistake(
        "the last whole chunk is left out: every whole chunk is clustered",
        "5.2",
        MATCHING,
        tuple((place, "chunked_soft_matching", wrong.without_last_chunk) for place in ("", "cache")),
    ),
    Mistake(
        "members are added in another order: ascending tokens, one after the other",
        "6.1",
        (*CENTROIDS, *KMEANS),
        wrong.merging(wrong.mean_by(wrong.add_descending)),
    ),
    Mistake(
        "members are added in float32: sums are float64, rounded once after the division",
        "6.1",
        (*CENTROIDS, *KMEANS),
        wrong.merging(wrong.mean_by(wrong.add_in_float32)),
    ),
    Mistake(
        "sums start at +0.0, which loses the sign of -0.0: they start at the first member",
        "6.2",
        (*CENTROIDS, *KMEANS),
        wrong.merging(wrong.mean_by(wrong.add_to_zero)),
    ),
    Mistake(
        "centroids are rounded to the dtype of the tokens: they are float32",
        "6.3",
        CENTROIDS,
        wrong.merging(wrong.rounded_mean),
    ),
    Mistake(
        "log counts are missing: a centroid of n tokens needs log n added to its logit",
        "8.1",
        ATTENTION,
        wrong.logs(lambda counts: np.where(counts > 0, 0.0, -np.inf)),
    ),
    Mistake(
        "logarithms of counts have base 2: they are natural",
        "8.1",
        ATTENTION,
        wrong.logs(lambda counts: wrong.quiet_log(counts) / np.log(2)),
    ),
    Mistake(
        "counts went through float16, which is inexact above 2,048: log counts need float32 or better",
        "8.1",
        ATTENTION,
        wrong.logs(wrong.log_of_float16),
    ),
    Mistake(
        "an entry of count 0 is attended to: its weight is 0",
        "8.2",
        ATTENTION,
        wrong.logs(lambda counts: wrong.quiet_log(np.maximum(counts, 1))),
    ),
    Mistake("scale is ignored where it is given", "7.1", ATTENTION, change=wrong.without("scale")),
    Mistake("logits are not scaled: the default is 1 / sqrt(dim)", "7.1", ATTENTION, change=wrong.unscaled),
    Mistake(
        "KV heads and groups are confused: query heads of one KV head lie together",
        "1.1",
        (*ATTENTION, *SELECTION),
        change=wrong.arrays(query=wrong.dealt_in_turn),
        restore=wrong.dealt_back,
    ),
    Mistake(
        "KV heads are confused: each group of queries has its own leading index",
        "1.1",
        (*ATTENTION, *SELECTION),
        change=wrong.arrays(query=lambda query: query[..., ::-1, :, :] if query.ndim > 2 else query),
    ),
    Mistake(
        "chunk boundaries are shifted by the sinks: the first chunk begins at token n_sink",
        "9.3",
        ("ClusteredCache",),
        change=wrong.boundaries_at_zero,
    ),
    Mistake("the recent tokens are clustered too", "9.2", ("ClusteredCache",), change=wrong.given("n_recent", 0)),
    Mistake("sinks are clustered too", "9.2", ("ClusteredCache",), change=wrong.given("n_sink", 0)),
    Mistake(
        "a chunk is clustered a token late: it is due as soon as n_recent tokens are younger",
        "9.4",
        ("ClusteredCache",),
        (("", "ClusteredCache", wrong.ClusteredLate),),
    ),
    Mistake(
        "an append clusters one chunk at most: every chunk that is due is clustered",
        "9.4",
        ("ClusteredCache",),
        (("", "ClusteredCache", wrong.OneChunkAnAppend),),
    ),
    Mistake(
        "the cache depends on how the tokens arrived: chunks lie at absolute positions",
        "9.6",
        ("ClusteredCache",),
        (("", "ClusteredCache", wrong.ClusteredByArrival),),
    ),
    Mistake(
        "an empty cluster becomes zero: it keeps the centroid that it last had",
        "10.5",
        KMEANS,
        (("kmeans", "update", wrong.update_to_zero),),
    ),
    Mistake("there is one round too few: max_iter rounds", "10.6", KMEANS, change=wrong.shifted("max_iter", -1)),
    Mistake("there is one round too many: max_iter rounds", "10.6", KMEANS, change=wrong.shifted("max_iter", 1)),
    Mistake(
        "tokens are assigned once more after the last update: labels are those that the centroids are means of",
        "10.6",
        KMEANS,
        (("kmeans", "lloyd", wrong.lloyd_that_assigns_last),),
    ),
    Mistake(
        "ties between clusters go to the largest index: the smallest wins",
        "10.3",
        KMEANS,
        (("kmeans", "assign", wrong.assign_to_the_last),),
    ),
    Mistake(
        "the centroids begin at the first tokens: they begin at tokens i * tokens // n_clusters",
        "10.1",
        KMEANS,
        (("kmeans", "lloyd", wrong.lloyd_from_first_tokens),),
    ),
    Mistake("one token too few is taken: exactly budget tokens are", "11.6", SELECTION, wrong.with_budget(-1)),
    Mistake("one token too many is taken: exactly budget tokens are", "11.6", SELECTION, wrong.with_budget(1)),
    Mistake(
        "the last cluster is not trimmed: exactly budget tokens are taken",
        "11.6",
        SELECTION,
        wrong.choosing(wrong.untrimmed),
    ),
    Mistake(
        "the cluster in which the budget ends is left out: it is trimmed to its first tokens",
        "11.6",
        SELECTION,
        wrong.choosing(wrong.last_dropped),
    ),
    Mistake(
        "ties between clusters go to the largest index: the smallest wins",
        "11.5",
        SELECTION,
        wrong.choosing(wrong.ties_to_the_last),
    ),
    Mistake(
        "the first query of the group decides alone: a cluster's score is the maximum over the group",
        "11.4",
        SELECTION,
        wrong.scores_by(lambda scores: scores[..., 0, :]),
    ),
    Mistake(
        "scores are averaged over the group: they are the maximum over it",
        "11.4",
        SELECTION,
        wrong.scores_by(lambda scores: scores.mean(axis=-2)),
    ),
    Mistake(
        "the mean cluster's score is not taken off before the maximum over the group",
        "11.4",
        SELECTION,
        wrong.scores_by(lambda scores: scores.max(axis=-2), has_mean=False),
    ),
    Mistake(
        "deviations are ignored: spread * |query| . deviation belongs to a cluster's score",
        "11.2",
        SELECTION,
        wrong.without_deviations(),
    ),
    Mistake(
        "sinks are not attended to: they always are",
        "13.11",
        ("RecallCache",),
        (("", "RecallCache", wrong.WithoutSinks),),
    ),
    Mistake(
        "recent tokens are not attended to: they always are",
        "13.11",
        ("RecallCache",),
        (("", "RecallCache", wrong.WithoutRecent),),
    ),
    Mistake(
        "the token before a segment boundary is attended to twice",
        "13.11",
        ("RecallCache",),
        (("", "RecallCache", wrong.WithOneTwice),),
    ),
    Mistake(
        "sinks are not counted: budget is all tokens attended to, sinks and recent included",
        "13.10",
        ("RecallCache",),
        change=wrong.budget_beside_sinks,
    ),
    Mistake(
        "prompt_segment_size 0 is taken for None: the first append gets no segments of its own",
        "13.5",
        ("RecallCache",),
        change=wrong.zero_is_none,
    ),
    Mistake(
        "centroids and deviations are not rounded to bfloat16",
        "13.7",
        ("RecallCache",),
        (("recall_cache", "round_to_bfloat16", lambda array: array),),
    ),
    *OWN_MISTAKES,
)
