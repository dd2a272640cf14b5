"""The conformance suite on heads with shares of their own: wrong fast caches are caught, their cause is named."""

import math
import types

import numpy as np
import pytest
from patches import Mutant, Patch, made_with, put, together

from kvcluster import fast
from kvcluster.conformance import Implementation, check

RAGGED, BOTH = ("RaggedCache",), ("ClusteredCache", "RaggedCache")
CACHE = "ragged_cache.RaggedCache"
N_CHUNKS = "memory/spans.SpanRules.n_chunks"


def ratios_by(change) -> Patch:
    return made_with(CACHE, keep_ratios=lambda given: tuple(change(given["keep_ratios"])))


def by_ratio(held):
    """The heads, those of one ratio together."""
    return sorted(range(len(held.keep_ratios)), key=lambda head: held.keep_ratios.index(held.keep_ratios[head]))


def entries_by_ratio(right, held):
    if (entries := right(held)) is None:
        return None
    keys, values, counts = entries
    order = by_ratio(held)
    return keys[..., order, :, :], values[..., order, :, :], counts[..., order, :]


def attend_by_ratio(right, held, query, **named):
    order = by_ratio(held)
    return right(held, query[:, np.argsort(order)], **named)[:, order]


def compress_apart(right, method, keys, values, *, heads_of_target, **rules):
    """Those of each target are all heads that there are."""
    made = []
    for target, heads in heads_of_target.items():
        alone = {target: [*range(len(heads))]}
        of_heads = (array[..., heads, :, :] for array in (keys, values))
        made += [(heads, chunks) for _, chunks in right(method, *of_heads, heads_of_target=alone, **rules)]
    return made


def compress_without_whole(right, method, keys, values, *, heads_of_target, **rules):
    """The heads that become fewer entries are all heads that there are."""
    left = sorted(head for heads in heads_of_target.values() for head in heads)
    places = {target: [left.index(head) for head in heads] for target, heads in heads_of_target.items()}
    made = right(method, *(array[..., left, :, :] for array in (keys, values)), heads_of_target=places, **rules)
    return [([left[place] for place in heads], chunks) for heads, chunks in made]


def recent_by(least) -> Patch:
    """Chunks that leave `least` tokens, a function of the rules and the number of tokens seen."""
    return put(lambda _, of, n: max(0, n - of.n_sink - least(of, n)) // of.chunk_size, N_CHUNKS)


def shared_by(share) -> Patch:
    """The same where the recent tokens are a share of the text."""
    return recent_by(lambda of, n: share(of, n) if of.recent_share else of.n_recent)


def one_chunk(right, held):
    rules, most = held._rules, held._n_chunks + 1
    at_most = {"n_chunks": lambda n_seen: min(most, rules.n_chunks(n_seen)), "n_groups": rules.n_groups}
    held._rules = types.SimpleNamespace(**at_most)
    right(held)
    held._rules = rules


def single_tokens_unclustered(right, held, keys, values):
    if keys.shape[-2] > 1:
        return right(held, keys, values)
    held.extend(keys, values)
    return held.entries()


def attending_by(change) -> Patch:
    """`change` of the attention and of what it gets: all arguments, as `attend_ragged` has them."""
    return put(lambda right, *of: lambda *arguments: change(right(*of), *arguments), "ragged_entries.implementation")


def counts_by(change) -> Patch:
    """Other counts, a function of the right ones, and of the heads' lengths and first places."""

    def changed(attend, query, keys, values, counts, lengths, firsts, *rest):
        return attend(query, keys, values, change(counts, lengths, firsts), lengths, firsts, *rest)

    return attending_by(changed)


def counts_of_the_first(counts, lengths, firsts):
    """The last entries of each head have the counts of the last entries of the first head."""
    changed = counts.clone()
    for n, first in zip(lengths, firsts, strict=True):
        n_same = min(n, lengths[0])
        changed[:, first : first + n] = 1
        of_first = counts[:, firsts[0] + lengths[0] - n_same : firsts[0] + lengths[0]]
        changed[:, first + n - n_same : first + n] = of_first
    return changed


def counts_one_head_on(counts, lengths, firsts):
    return counts.roll(-(firsts[1] - firsts[0]) if len(firsts) > 1 else 1, dims=-1)


def entries_first(right, *of):
    keys, values, counts = right(*of)
    order = (counts == 0).int().argsort(dim=-1, stable=True)
    keys, values = (array.take_along_dim(order.unsqueeze(-1), dim=-2) for array in (keys, values))
    return keys, values, counts.gather(-1, order)


def places_count(right, *of):
    keys, values, counts = right(*of)
    return keys, values, counts.clamp(min=1)


def attend_to_the_rectangle(_, held, query, *, scale=None):
    return fast.clustered_attention(query, *held.entries(), scale=scale)


def in_one_round(right, ratio, size):
    return max(right(ratio, size), size - size // 2)


RECTANGLE = "memory/ragged.RaggedRows.rectangle"
CAUSES = {
    "the first ratio": "all heads have the ratio of the first",
    "the mean ratio": "all heads have the mean of the ratios",
    "the largest ratio": "all heads have the largest ratio",
    "sorted ratios": "keep_ratios are sorted",
    "ratios backwards": "keep_ratios are read from the last to the first",
    "target by floor": "the target is rounded down",
    "only one round": "there is one round only",
    "n_shared ignored": "n_shared is ignored",
    "heads by ratio": "heads of one ratio lie together",
    "each ratio alone": "heads are clustered with those of their ratio alone",
    "without whole heads": "heads of ratio 1 have no say",
    "a token late": "a chunk is clustered a token late",
    "recent tokens are clustered": "the recent tokens are clustered too",
    "sinks are clustered": "sinks are clustered too",
    "chunks shifted by the sinks": "chunk boundaries are shifted by the sinks",
    "one chunk an append": "an append clusters one chunk at most",
    "single tokens are not clustered": "the cache depends on how the tokens arrived",
    "append returns what is left": "append returns the entries after its clustering",
    "log counts dropped": "log counts are missing",
    "counts of the first head": "the counts of the first head are used for all",
    "counts of the next head": "entries are right, attention is not",
    "as many entries as the shortest": "entries are right, attention is not",
    "explicit scale forgotten": "scale is ignored",
    "entries before empty places": "entries come before the places of count 0",
    "empty places count": "places without an entry are attended to",
    "share ignored": "recent_share is ignored",
    "share beside n_recent": "recent_share comes on top of n_recent",
    "share without the sinks": "recent_share is of the tokens after the sinks",
    "share rounded up": "recent_share * n_seen is rounded up",
    "share in float32": "recent_share * n_seen is exact or float32",
}
MUTANTS = (
    Mutant("the first ratio", RAGGED, ratios_by(lambda ratios: ratios[:1] * len(ratios))),
    Mutant("the mean ratio", RAGGED, ratios_by(lambda ratios: [sum(ratios) / len(ratios)] * len(ratios))),
    Mutant("the largest ratio", RAGGED, ratios_by(lambda ratios: [max(ratios)] * len(ratios))),
    Mutant("sorted ratios", RAGGED, ratios_by(sorted)),
    Mutant("ratios backwards", RAGGED, ratios_by(reversed)),
    Mutant("target by floor", RAGGED, put(lambda _, r, size: max(1, int(r * size)), "ragged_cache.entries_of_chunk")),
    Mutant("only one round", RAGGED, put(in_one_round, "ragged_cache.entries_of_chunk")),
    Mutant("n_shared ignored", RAGGED, made_with(CACHE, method=lambda given: fast.SoftMatching())),
    Mutant(
        "heads by ratio",
        RAGGED,
        together(put(entries_by_ratio, f"{CACHE}.entries"), put(attend_by_ratio, f"{CACHE}.attend_rows")),
    ),
    Mutant("each ratio alone", RAGGED, put(compress_apart, "ragged_cache.compress_heads")),
    Mutant("without whole heads", RAGGED, put(compress_without_whole, "ragged_cache.compress_heads")),
    Mutant("a token late", BOTH, recent_by(lambda of, n: max(of.n_recent, math.floor(of.recent_share * n)) + 1)),
    Mutant("recent tokens are clustered", BOTH, recent_by(lambda of, n: math.floor(of.recent_share * n))),
    Mutant("sinks are clustered", RAGGED, made_with(CACHE, n_sink=lambda given: 0)),
    Mutant(
        "chunks shifted by the sinks",
        RAGGED,
        made_with(CACHE, n_sink=lambda given: (n := given.get("n_sink", 16)) + -n % given.get("chunk_size", 256)),
    ),
    Mutant("one chunk an append", RAGGED, put(one_chunk, f"{CACHE}._cluster")),
    Mutant("single tokens are not clustered", RAGGED, put(single_tokens_unclustered, f"{CACHE}.append")),
    Mutant(
        "append returns what is left",
        RAGGED,
        put(lambda right, held, *new: right(held, *new) and held.entries(), f"{CACHE}.append"),
    ),
    Mutant("log counts dropped", RAGGED, counts_by(lambda counts, *_: counts.clamp(max=1))),
    Mutant("counts of the first head", RAGGED, counts_by(counts_of_the_first)),
    Mutant("counts of the next head", RAGGED, counts_by(counts_one_head_on)),
    Mutant(
        "as many entries as the shortest",
        RAGGED,
        attending_by(lambda attend, *of: attend(*of[:4], (min(of[4]),) * len(of[4]), *of[5:])),
    ),
    Mutant(
        "explicit scale forgotten",
        RAGGED,
        attending_by(lambda attend, *of: attend(*of[:-1], of[0].shape[-1] ** -0.5)),
    ),
    Mutant("entries before empty places", RAGGED, put(entries_first, RECTANGLE)),
    Mutant(
        "empty places count",
        RAGGED,
        together(put(places_count, RECTANGLE), put(attend_to_the_rectangle, f"{CACHE}.attend")),
    ),
    Mutant("share ignored", BOTH, shared_by(lambda of, n: of.n_recent)),
    Mutant("share beside n_recent", BOTH, shared_by(lambda of, n: of.n_recent + math.floor(of.recent_share * n))),
    Mutant(
        "share without the sinks",
        BOTH,
        shared_by(lambda of, n: max(of.n_recent, math.floor(of.recent_share * max(0, n - of.n_sink)))),
    ),
    Mutant("share rounded up", BOTH, shared_by(lambda of, n: max(of.n_recent, math.ceil(of.recent_share * n)))),
    Mutant(
        "share in float32",
        BOTH,
        shared_by(lambda of, n: max(of.n_recent, math.floor(np.float32(of.recent_share) * np.float32(n)))),
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_and_its_cause_named(mutant, monkeypatch):
    mutant.patch(monkeypatch)
    report = check(Implementation(fast), only=BOTH, has_smallest=False)
    found = {each.operation: each.counterexample for each in report.operations if each.counterexample is not None}
    assert set(found) == set(mutant.operations)
    for each in found.values():
        assert each.cause is not None
        assert CAUSES[mutant.name] in each.cause
        assert "." in each.rule


def test_every_mutant_has_a_cause():
    assert [mutant.name for mutant in MUTANTS] == list(CAUSES)
