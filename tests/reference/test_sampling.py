"""The sample at which k-means begins: by hand, without replacement, its own for each seed, head and segment."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits

from kvcluster.fast.exact import sampling as fast_sampling
from kvcluster.reference.sampling import sample_tokens

SIZES = [(1, 1), (2, 1), (5, 5), (320, 4), (1000, 13)]


def numbers_by_hand(n_tokens, *words):
    """The numbers of section 13 of the specification, in Python's integers."""
    numbers = []
    for token in range(n_tokens):
        state = 0
        for word in (*words, token):
            state = (state + word + 0x9E3779B9) % 2**32
            for _ in range(2):
                state = (state ^ state // 2**16) * 0x45D9F3B % 2**32
            state ^= state // 2**16
        numbers.append(state)
    return numbers


@pytest.mark.parametrize("words", [(0, 0, 0), (1, 2, 320), (2**32 - 1, 7, 2**33 + 5)])
def test_the_tokens_of_smallest_numbers_are_drawn(words):
    seed, head, start = words
    for n_tokens, n_drawn in SIZES:
        numbers = numbers_by_hand(n_tokens, *words)
        assert len(set(numbers)) == n_tokens
        expected = sorted(sorted(range(n_tokens), key=numbers.__getitem__)[:n_drawn])
        assert sample_tokens(n_tokens, n_drawn, seed=seed, head=head, start=start).tolist() == expected


def test_seeds_heads_and_segments_have_samples_of_their_own():
    words = itertools.product(range(5), range(5), (0, 320, 640))
    drawn = {tuple(sample_tokens(1000, 13, seed=seed, head=head, start=start)) for seed, head, start in words}
    assert len(drawn) == 75


def test_every_token_is_drawn_about_as_often_as_any_other():
    """3 of 6 tokens, 8,000 times: each of the 20 sets about 400 times."""
    draws = itertools.product(range(1000), range(8))
    drawn = [tuple(sample_tokens(6, 3, seed=seed, head=head, start=0)) for seed, head in draws]
    times = [drawn.count(one) for one in itertools.combinations(range(6), 3)]
    assert sum(times) == 8000
    assert 300 < min(times) < max(times) < 500


@pytest.mark.parametrize("twin", ["right", "heads", "starts"])
def test_torch_draws_the_same(twin):
    heads, starts = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 320])
    for n_tokens, n_drawn in SIZES[3:]:
        given = {"heads": 0 * heads if twin == "heads" else heads, "starts": 0 * starts if twin == "starts" else starts}
        ours = fast_sampling.sample_tokens(n_tokens, n_drawn, seed=2**32 - 9, **given)
        expected = np.array(
            [
                [sample_tokens(n_tokens, n_drawn, seed=2**32 - 9, head=int(h), start=int(s)) for s in starts]
                for h in heads
            ]
        )
        if twin == "right":
            assert_same_bits(ours, expected)
        else:
            assert not np.array_equal(ours, expected)
