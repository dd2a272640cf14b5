"""The conformance suite on attended matching: wrong implementations are caught, their cause is named."""

import math

import pytest
import torch
from patches import Mutant, put

from kvcluster import fast
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.explaining import decisions
from kvcluster.conformance.operations import OPERATIONS

ONLY = ("attended_matching",)
MARGINS = "plain/attended_matching.attention_margins", "cpu/attended_matching.attention_margins"
FIRST, COMPRESS = "attended_matching.with_attended_first", "attended_matching.Attended.compress_heads"


def dots(keys, queries):
    return queries.double() @ keys.double().mT  # (chunks, queries, chunk)


def of_length_1(array):
    return torch.nn.functional.normalize(array.double(), dim=-1).float()


def averaged(right, keys, queries):
    return torch.stack([right(keys, query.unsqueeze(1).contiguous()) for query in queries.unbind(1)]).mean(dim=0)


def last_of_ties(right, scores, margins, n_attended):
    return right(scores.flip(-1), margins.flip(-1), n_attended).flip(-1)


def all_heads_alike(right, scores, margins, n_attended):
    return right(scores, margins.amax(dim=1, keepdim=True).expand(margins.shape), n_attended)


def first_chunk_for_all(right, *arrays, queries, **rules):
    return right(*arrays, queries=queries[..., :1, :, :].expand(queries.shape), **rules)


CAUSES = {
    "no queries": "the queries take no part",
    "largest product": "a token's score is its largest dot product",
    "compared with itself": "a query's best token has a margin of 0",
    "averaged over queries": "margins are averaged over the queries",
    "softmax": "scores are attention weights",
    "unit keys": "keys are divided by their lengths",
    "unit queries": "queries are divided by their lengths",
    "the least attended": "the tokens that are attended to least stay exact",
    "heads alike": "all heads keep the same attended tokens",
    "last of ties": "ties between margins go to the last token",
    "queries of the first chunk": "all chunks are matched by the queries of the first",
}
MUTANTS = (
    Mutant("no queries", ONLY, put(lambda right, *arrays: torch.zeros_like(right(*arrays)), *MARGINS)),
    Mutant("largest product", ONLY, put(lambda _, *arrays: dots(*arrays).amax(dim=1), *MARGINS)),
    Mutant("compared with itself", ONLY, put(lambda right, *arrays: right(*arrays).clamp(max=0), *MARGINS)),
    Mutant("averaged over queries", ONLY, put(averaged, *MARGINS)),
    Mutant(
        "softmax",
        ONLY,
        put(lambda _, k, q: torch.softmax(dots(k, q) / math.sqrt(k.shape[-1]), dim=-1).mean(dim=1), *MARGINS),
    ),
    Mutant("unit keys", ONLY, put(lambda right, k, q: right(of_length_1(k), q.float()), *MARGINS)),
    Mutant("unit queries", ONLY, put(lambda right, k, q: right(k.float(), of_length_1(q)), *MARGINS)),
    Mutant("the least attended", ONLY, put(lambda right, *arrays: -right(*arrays), *MARGINS)),
    Mutant("heads alike", ONLY, put(all_heads_alike, FIRST)),
    Mutant("last of ties", ONLY, put(last_of_ties, FIRST)),
    Mutant("queries of the first chunk", ONLY, put(first_chunk_for_all, COMPRESS)),
)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_and_its_cause_named(mutant, monkeypatch):
    mutant.patch(monkeypatch)
    [found] = check(Implementation(fast), only=ONLY, has_smallest=False).operations
    assert CAUSES[mutant.name] in found.counterexample.cause
    assert "." in found.counterexample.rule


def test_every_mutant_has_a_cause_that_is_known():
    assert [mutant.name for mutant in MUTANTS] == list(CAUSES)
    known = {mistake.cause for mistake in OPERATIONS[ONLY[0]].mistakes}
    for cause in CAUSES.values():
        assert sum(cause in each for each in known) == 1, cause


@pytest.mark.slow
def test_a_counterexample_is_small_and_says_who_stays(monkeypatch):
    next(mutant for mutant in MUTANTS if mutant.name == "the least attended").patch(monkeypatch)
    found = check(Implementation(fast), only=ONLY).operations[0].counterexample
    assert found.case.arrays["keys"].size <= 24
    told = decisions(found.case)
    assert any("are attended" in line for line in told)
    assert any("has margins" in line for line in told)
