"""Pages of an engine: the rule that says what is where, clustering in place, and attention to pages in C++."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from caches import of_reference
from inputs import DTYPES, to_numpy, to_torch

from kvcluster.fast import Distinctive
from kvcluster.fast.cpu.paged import attend_pages
from kvcluster.fast.vllm.pages import cells_of, cluster_chunks, counts_of, keys_of, values_of
from kvcluster.fast.vllm.rule import PageRule
from kvcluster.fast.vllm.steps import plan_step

HEADS, GROUP = 2, 3


def make_rule(**changes):
    numbers = {"page": 32, "keep_ratio": 0.25, "chunk_size": 128, "n_sink": 32, "n_recent": 40}
    return PageRule(**numbers | changes)


class Pool:
    """One request's tokens in pages that lie anywhere in a pool of NaN, and the reference's cache of them."""

    def __init__(self, rule, n_tokens, *, dim=64, dtype="f32", seed=0):
        rng = np.random.default_rng(seed)
        tokens = [to_torch(x.astype(DTYPES[dtype])) for x in rng.standard_normal((2, HEADS, n_tokens, dim))]
        page, n_pages = rule.page, -(-n_tokens // rule.page)
        content = 2 * dim + 4 // tokens[0].element_size()
        self.rule, self.dim, self.tokens, self.n_tokens = rule, dim, tokens, n_tokens
        self.cells = cells_of(torch.full((n_pages + 9, HEADS, page, content), torch.nan, dtype=tokens[0].dtype))
        self.table = torch.from_numpy(rng.permutation(n_pages + 9)[:n_pages])
        places = torch.arange(n_tokens)
        at = self.table[places // page], slice(None), slice(None), places % page
        self.keys[at] = tokens[0].transpose(0, 1)
        self.values[self.table[places // page], :, places % page] = tokens[1].transpose(0, 1)
        self.n_chunks = rule.n_chunks(n_tokens, n_tokens)

    @property
    def keys(self):
        return keys_of(self.cells, self.rule.page, self.dim)

    @property
    def values(self):
        return values_of(self.cells, self.rule.page, self.dim)

    def cluster(self):
        blocks = [self.table[list(self.rule.pages_of(chunk))] for chunk in range(self.n_chunks)]
        if blocks:
            blocks = torch.stack(blocks)
            to = blocks[:, : self.rule.entries // self.rule.page]
            cluster_chunks(self.cells, blocks, self.cells, to, self.rule, self.dim)

    @property
    def kept(self):
        return self.table[self.rule.kept_pages(self.n_tokens, self.n_chunks)]

    def held(self):
        """Keys, values and counts as they lie in the pages, in the order of the rule."""
        rule, n_stored = self.rule, self.rule.n_stored(self.n_tokens, self.n_chunks)
        keys = self.keys[self.kept].permute(1, 0, 3, 2).flatten(1, 2)[:, :n_stored]
        values = self.values[self.kept].transpose(0, 1).flatten(1, 2)[:, :n_stored]
        counts = counts_of(self.cells, rule.page, self.dim)[self.kept].transpose(0, 1).flatten(1, 2).clone()
        body = slice(rule.n_sink, rule.n_sink + self.n_chunks * rule.entries)
        counts[:, : body.start] = counts[:, body.stop :] = 1
        return keys, values, counts[:, :n_stored]

    def attend(self, query, n_new, **wrong):
        """Output of the last `n_new` tokens, (tokens, heads, dim)."""
        rule = self.rule
        first, per_chunk = rule.n_sink // rule.page, rule.entries // rule.page
        numbers = {
            "first": 2,
            "n_new": n_new,
            "n_stored": rule.n_stored(self.n_tokens, self.n_chunks),
            "counted": first,
            "uncounted": first + self.n_chunks * per_chunk,
        } | wrong
        request = torch.tensor([list(numbers.values())])
        tables = self.kept.int()[None]
        output = attend_pages(query, self.cells, tables, request, page=rule.page, scale=self.dim**-0.5)
        return output[numbers["first"] :][:n_new]


def reference_cache(pool):
    rule = pool.rule
    cache = of_reference(
        keep_ratio=rule.keep_ratio,
        method=rule.method,
        chunk_size=rule.chunk_size,
        n_sink=rule.n_sink,
        n_recent=rule.n_recent,
    )
    cache.append(*map(to_numpy, pool.tokens))
    return cache


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 199, 200, 201, 327, 328, 600])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": Distinctive(n_shared=4)},
        {"keep_ratio": 0.5, "chunk_size": 64, "n_recent": 0},
        {"keep_ratio": 1.0},
    ],
)
def test_pages_hold_the_bits_of_the_reference(n_tokens, dtype, changes):
    pool = Pool(make_rule(**changes), n_tokens, dtype=dtype, seed=n_tokens)
    pool.cluster()
    cache = reference_cache(pool)
    for held, expected in zip(pool.held(), (cache.keys, cache.values, cache.counts), strict=True):
        assert_same_bits(held, expected)


def test_other_pages_of_a_chunk_are_not_those_of_its_entries():
    """The wrong twin of `kept_pages`: the last pages of each chunk instead of the first."""
    pool = Pool(make_rule(), 600)
    pool.cluster()
    kept = [
        pool.table[0],
        *(pool.table[rule_pages[-1]] for rule_pages in map(pool.rule.pages_of, range(pool.n_chunks))),
    ]
    keys = pool.keys[torch.stack(kept)].permute(1, 0, 3, 2).flatten(1, 2)
    assert not np.array_equal(to_numpy(keys), reference_cache(pool).keys[:, : keys.shape[1]])


@pytest.mark.parametrize("n_new", [1, 7, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "n_tokens", "changes"),
    [
        (64, 300, {}),
        (32, 1500, {"page": 64, "chunk_size": 256, "n_sink": 64}),
        (128, 201, {}),
        (80, 333, {"page": 96, "n_sink": 96, "keep_ratio": 0.5, "chunk_size": 192, "method": Distinctive()}),
        (64, 5000, {"keep_ratio": 0.5}),
    ],
)
def test_attention_to_pages_is_within_the_bound(n_new, dtype, dim, n_tokens, changes):
    pool = Pool(make_rule(**changes), n_tokens, dim=dim, dtype=dtype)
    pool.cluster()
    rng = np.random.default_rng(1)
    query = to_torch(rng.standard_normal((n_new + 5, HEADS * GROUP, dim)).astype(DTYPES[dtype]))
    output = pool.attend(query, n_new)  # float32
    keys, values, counts = pool.held()
    for token in range(n_new)[:: max(1, n_new // 3)]:
        seen = keys.shape[1] - n_new + token + 1
        assert attention_agrees(
            output[token].reshape(HEADS, GROUP, dim).to(query.dtype),
            query[2 + token].reshape(HEADS, GROUP, dim),
            keys[:, :seen],
            values[:, :seen],
            counts[:, :seen],
        )


@pytest.mark.parametrize(
    "wrong", [{"uncounted": 1}, {"counted": 2}, {"n_stored": 231}, {"first": 3}], ids=lambda wrong: next(iter(wrong))
)
def test_wrong_twins_of_attention_to_pages_are_out_of_bound(wrong):
    """Counts dropped, counts of the first chunk dropped, the last token not seen, another token's query."""
    pool = Pool(make_rule(), 520)
    pool.cluster()
    query = to_torch(np.random.default_rng(2).standard_normal((4, HEADS * GROUP, 64)).astype(np.float32))
    arrays = query[2].reshape(HEADS, GROUP, 64), *pool.held()
    assert attention_agrees(pool.attend(query, 1)[0].reshape(HEADS, GROUP, 64), *arrays)
    assert not attention_agrees(pool.attend(query, 1, **wrong)[0].reshape(HEADS, GROUP, 64), *arrays)


def test_requests_of_one_call_do_not_touch_each_other():
    """Two requests in one pool, their tokens apart in the batch: the outputs of each alone, to the bit."""
    pool = Pool(make_rule(), 520)
    pool.cluster()
    query = to_torch(np.random.default_rng(3).standard_normal((9, HEADS * GROUP, 64)).astype(np.float32))
    requests = torch.tensor([[6, 2, 232, 1, 4], [1, 3, 40, 0, 0]])
    tables = torch.zeros(2, len(pool.kept), dtype=torch.int32)
    tables[0], tables[1, :2] = pool.kept, pool.kept[[0, -1]]
    both = attend_pages(query, pool.cells, tables, requests, page=32, scale=0.125)
    for row, tokens in ((0, slice(6, 8)), (1, slice(1, 4))):
        alone = attend_pages(query, pool.cells, tables[row : row + 1], requests[row : row + 1], page=32, scale=0.125)
        assert torch.equal(both[tokens], alone[tokens])


@pytest.mark.parametrize(("n_prompt", "n_tokens"), [(300, 299), (520, 519)])
def test_nothing_is_clustered_before_the_prompt_is_whole(n_prompt, n_tokens):
    rule = make_rule()
    assert rule.n_chunks(n_tokens, n_prompt) == 0
    assert rule.n_chunks(n_prompt, n_prompt) > 0


@pytest.mark.parametrize("changes", [{}, {"keep_ratio": 0.5}, {"chunk_size": 256, "n_sink": 0}, {"n_recent": 0}])
def test_every_page_is_kept_or_free_and_none_is_both(changes):
    rule = make_rule(**changes)
    for n_tokens in range(1, 900, 13):
        n_chunks = rule.n_chunks(n_tokens, 1)
        kept = rule.kept_pages(n_tokens, n_chunks).tolist()
        free = [place for chunk in range(n_chunks) for place in rule.hole(chunk)]
        assert sorted(kept + free) == list(range(-(-n_tokens // rule.page)))
        assert kept == sorted(kept)
        assert rule.n_stored(n_tokens, n_chunks) <= len(kept) * rule.page


def test_each_request_of_a_step_is_served_once_and_each_chunk_clustered_once():
    """Requests that come in random pieces, step after step: a chunk is due once, when the rule says that it is."""
    rule, rng = make_rule(), np.random.default_rng(4)
    prompts, totals = rng.integers(1, 700, 8), rng.integers(700, 900, 8)
    table, done = np.arange(8 * 29).reshape(8, 29), np.zeros(8, dtype=int)
    clustered = [[] for _ in prompts]
    while (done < totals).any():
        rows = np.flatnonzero(done < totals)
        new = np.where(done < prompts, rng.choice([prompts - done, rng.integers(1, 200, 8)]), 1)[rows]
        new = np.minimum(new, totals[rows] - done[rows])
        done[rows] += new
        starts = np.concatenate([[0], np.cumsum(new)])
        plan = plan_step(rule, starts, done[rows], prompts[rows], table[rows])
        assert sorted(plan.paged + plan.own + plan.clustered) == list(range(len(rows)))
        for due in (plan.due, plan.due_of_own):
            for to in due.to:
                clustered[to[0] // 29].append(int(to[0] % 29))
        for row in plan.own:
            assert new[row] == done[rows][row]
    for row, places in enumerate(clustered):
        n_chunks = rule.n_chunks(int(totals[row]), int(prompts[row]))
        assert places == [rule.pages_of(chunk)[0] for chunk in range(n_chunks)]


@pytest.mark.parametrize("changes", [{}, {"keep_ratio": 0.5}, {"chunk_size": 256, "n_sink": 0}, {"n_recent": 0}])
def test_the_most_pages_are_those_of_the_worst_length(changes):
    """Pages of n tokens, of which the step before had clustered what it may have."""
    rule = make_rule(**changes)
    held = [len(rule.kept_pages(n_tokens, rule.n_chunks(max(0, n_tokens - 1), 1))) for n_tokens in range(1500)]
    for n_tokens in (1, 40, 199, 200, 201, 327, 328, 329, 700, 1499):
        assert rule.most_pages(n_tokens) == max(held[: n_tokens + 1])
