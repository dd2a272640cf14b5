"""The conformance suite on distinctive matching and budgets: wrong implementations are caught, their cause is named."""

import hashlib
import sys
import types
from dataclasses import replace

import pytest
import torch
from patches import Mutant, made_with, put, together

from kvcluster import fast, reference
from kvcluster.conformance import Implementation, all_cases, check
from kvcluster.conformance.explaining import decisions
from kvcluster.conformance.operations import OPERATIONS
from kvcluster.fast.exact.mean import ordered_mean
from kvcluster.fast.exact.similarity import canonical_similarity

BOTH, CACHE = ("distinctive_matching", "ClusteredCache"), ("ClusteredCache",)
SCORES, SPLIT, MATCH, SPACED = (
    f"exact/distinctiveness.{name}" for name in ("distinctiveness", "split_by_score", "match_ordinary", "evenly_spaced")
)
COMPRESS = "plain/distinctive_matching.compress"
OF_LAYERS = "plain/distinctive_matching.scores", "cpu/distinctive_matching.scores"
LIKENESS = "plain/distinctive_matching.likeness_to_mean", "cpu/distinctive_matching.likeness_to_mean"
CLUSTERED, BOUNDED = "cache.ClusteredCache", "bounded_cache.BoundedCache"


def as_layers_of_one_head(right, *likeness):
    return right(*(array.flatten(0, 1).unsqueeze(1) for array in likeness))


def as_one_layer(right, keys, values, chunk_size):
    scores = right(*(array.reshape(-1, *array.shape[-2:]) for array in (keys, values)), chunk_size)
    return scores.expand(keys.shape[:-3].numel(), -1, -1)


def likeness_to_rounded_mean(right, tokens):
    chunks, size, _ = tokens.shape
    of_all = torch.zeros(chunks, size, dtype=torch.int64), torch.full((chunks, 1), size)
    return canonical_similarity(tokens, ordered_mean(tokens, *of_all).to(tokens.dtype))


def divided_by_window(right, *likeness):
    size = likeness[0].shape[-1]
    inside = torch.tensor([min(size, token + 4) - max(0, token - 3) for token in range(size)])
    return right(*likeness) * inside / 7


def without_window(monkeypatch):
    monkeypatch.setattr(sys.modules["kvcluster.fast.exact.distinctiveness"], "WINDOW", 1)


def last_of_tied_tokens(right, scores, heads, n_exact):
    places = right(scores.flip(-1), heads, n_exact)
    return [(scores.shape[-1] - 1 - part).sort(dim=-1).values for part in places]


def match_by(choose):
    """`match_ordinary` that looks at all similarities; `choose` gets them, and the places of the destinations."""

    def match(right, keys, n_shared):
        at = torch.arange(n_shared) * keys.shape[1] // n_shared
        similarities = fast.similarity(keys.float(), keys[:, at].float())
        return choose(similarities, at), right(keys, n_shared)[1]

    return put(match, MATCH)


def last_of_tied(similarities, at):
    found = len(at) - 1 - similarities.flip(-1).argmax(dim=-1)
    found[:, at] = torch.arange(len(at))
    return found


def shared_first(right, *arrays, target, n_shared, **rules):
    made = right(*arrays, target=target, n_shared=n_shared, **rules)
    by = max(1, min(n_shared, target // 2))
    entries = {name: getattr(made, name).roll(by, dims=1) for name in ("keys", "values", "counts")}
    return replace(made, labels=(made.labels + by) % target, **entries)


def spans_by(wrong_min):
    """Spans planned with another `min` of one list; never from, nor into, what is remembered of right plans."""

    def patch(monkeypatch):
        module = sys.modules["kvcluster.fast.memory.spans"]
        monkeypatch.setattr(module, "min", lambda *x: wrong_min(*x) if len(x) == 1 else min(*x), raising=False)
        put(lambda right, *of: right.__wrapped__(*of), "memory/spans.plan_spans")(monkeypatch)

    return patch


def all_new_chunks_first(right, spans, n_new, _, most_now):
    return right((*spans, *[1] * n_new), 0, most_now, most_now)


def unweighted(right, keys, values, counts):
    return (*right(keys, values, torch.ones_like(counts))[:2], *right(keys, values, counts)[2:])


CAUSES = {
    "scores by keys alone": "values take no part in the scores",
    "scores by values alone": "keys take no part in the scores",
    "heads apart": "each head keeps tokens of its own",
    "batch rows together": "all leading axes are added",
    "mean in the dtype": "the mean of a chunk is rounded to the dtype",
    "no window": "scores are not averaged over neighbours",
    "always by seven": "are divided by seven",
    "the least distinctive": "the tokens that stand out least stay exact",
    "tied tokens: the last": "ties between scores go to the last token",
    "first ordinary tokens": "the first ordinary tokens are destinations",
    "tied destinations: the last": "ties between destinations go to the last",
    "destinations may leave": "a destination joins an equal one before it",
    "shared entries first": "the shared entries come first",
    "n_shared ignored": "n_shared is ignored",
    "budget ignored": "budget is ignored",
    "sinks beside the budget": "sinks are not counted",
    "budget at the end": "the budget is kept after an append only",
    "the oldest pair": "the oldest pair of spans is merged",
    "merged without weights": "entries of merged spans weigh the same",
}
MUTANTS = (
    Mutant("scores by keys alone", BOTH, put(lambda right, keys, values: right(keys, 0 * values), SCORES)),
    Mutant("scores by values alone", BOTH, put(lambda right, keys, values: right(0 * keys, values), SCORES)),
    Mutant(
        "heads apart",
        BOTH,
        together(put(as_layers_of_one_head, SCORES), put(lambda right, x, _, n: right(x, 1, n), SPLIT)),
    ),
    Mutant("batch rows together", BOTH, put(as_one_layer, *OF_LAYERS)),
    Mutant("mean in the dtype", BOTH[:1], put(likeness_to_rounded_mean, *LIKENESS)),
    Mutant("no window", BOTH, without_window),
    Mutant("always by seven", BOTH, put(divided_by_window, SCORES)),
    Mutant("the least distinctive", BOTH, put(lambda right, *likeness: -right(*likeness), SCORES)),
    Mutant("tied tokens: the last", BOTH[:1], put(last_of_tied_tokens, SPLIT)),
    Mutant(
        "first ordinary tokens",
        BOTH,
        put(lambda _, n_shared, size, device: torch.arange(n_shared), SPACED),
    ),
    Mutant("tied destinations: the last", BOTH, match_by(last_of_tied)),
    Mutant("destinations may leave", BOTH[:1], match_by(lambda similarities, at: similarities.argmax(dim=-1))),
    Mutant("shared entries first", BOTH, put(shared_first, COMPRESS)),
    Mutant("n_shared ignored", CACHE, made_with(CLUSTERED, method=lambda given: fast.SoftMatching())),
    Mutant("budget ignored", CACHE, made_with(BOUNDED, budget=lambda given: 10**9)),
    Mutant(
        "sinks beside the budget",
        CACHE,
        made_with(BOUNDED, budget=lambda given: given["budget"] + given["n_sink"]),
    ),
    Mutant("budget at the end", CACHE, put(all_new_chunks_first, "memory/spans.plan_spans")),
    Mutant("the oldest pair", CACHE, spans_by(lambda together: together[0])),
    Mutant("merged without weights", CACHE, put(unweighted, "plain/span_merging.merge_entries")),
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


def test_every_mutant_has_a_cause_that_is_known():
    assert [mutant.name for mutant in MUTANTS] == list(CAUSES)
    known = {mistake.cause for operation in BOTH for mistake in OPERATIONS[operation].mistakes}
    for cause in CAUSES.values():
        assert sum(cause in each for each in known) == 1, cause


@pytest.mark.slow
def test_a_counterexample_is_small_and_says_who_stays(monkeypatch):
    next(mutant for mutant in MUTANTS if mutant.name == "first ordinary tokens").patch(monkeypatch)
    found = check(Implementation(fast), only=BOTH[:1]).operations[0].counterexample
    assert found.case.arrays["keys"].size <= 24
    told = decisions(found.case)
    assert any("of them shared" in line for line in told)
    assert any("ordinary, in entry" in line for line in told)


class WithoutOurs:
    """Of `ClusteredCache` what the papers have; no distinctive matching."""

    class ClusteredCache(reference.ClusteredCache):
        def __init__(self, *, keep_ratio, chunk_size=256, n_sink=16, n_recent=64):
            rules = {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
            super().__init__(**rules)


@pytest.mark.slow
def test_who_has_neither_passes_the_rest():
    """And small counterexamples are looked for among what can be asked only."""
    report = check(Implementation(WithoutOurs))
    assert report.agrees
    skipped = {each.operation: each.skipped for each in report.operations}
    assert set(skipped["distinctive_matching"]) == {"no such name"}
    assert set(skipped["ChelseaCache"]) == set(skipped["RaggedCache"]) == {"no such name"}
    lacking = {f"no parameter {name}" for name in ("n_shared", "budget", "whole_heads", "recent_share", "bits")}
    assert lacking <= set(skipped["ClusteredCache"])
    wrong = types.SimpleNamespace(ClusteredCache=type("Wrong", (WithoutOurs.ClusteredCache,), {"n_stored": -1}))
    found = check(Implementation(wrong), only=CACHE).operations[0].counterexample
    assert found.difference.what == "n_stored"
    assert not {"method", "n_shared", "budget", "whole_heads", "recent_share", "bits"} & set(found.case.parameters)


OLD_DEFAULTS = {"chunk_size": 64, "n_sink": 4, "n_recent": 64}


def test_earlier_cases_are_what_they_were():
    """Made once, before there were cases of ours: files of them stay right."""
    later, digest = (
        ("attended_matching", "distinctive_matching", "ChelseaCache", "RaggedCache", "quantize"),
        hashlib.sha256(),
    )
    for case in all_cases():
        if case.operation not in later and not OPERATIONS[case.operation].has_option(case):
            if case.name == "new-defaults":
                continue
            sizes = set(OLD_DEFAULTS) if case.name == "defaults" else set()  # spelled since the defaults are others
            assert all(case.parameters[name] == OLD_DEFAULTS[name] for name in sizes)
            parameters = sorted((name, value) for name, value in case.parameters.items() if name not in sizes)
            digest.update(repr((case.operation, case.name, parameters, case.is_refused)).encode())
            for name, array in case.arrays.items():
                digest.update(name.encode() + array.tobytes())
    assert digest.hexdigest()[:16] == "6cb4a59514848341"
