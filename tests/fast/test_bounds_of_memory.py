"""Compiled code never reads outside its tensors, whatever a damaged cache may say."""

import numpy as np
import pytest
import torch
from inputs import make_keys

from kvcluster import fast
from kvcluster.fast.backends import cell

CACHES = {
    "exact": lambda: fast.RaggedCache(keep_ratios=(0.25, 0.5), chunk_size=32, n_sink=4, n_recent=32),
    "ragged": lambda: fast.RaggedCache(keep_ratios=(0.25, 0.5), chunk_size=32, n_sink=4, n_recent=32, bits=4),
    "even": lambda: fast.ClusteredCache(keep_ratio=0.25, chunk_size=32, n_sink=4, n_recent=32, bits=4),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_is_wrong_about_its_rows_is_refused(kind):
    cache, tokens = CACHES[kind](), torch.from_numpy(make_keys("smooth", (1, 2, 300, 16), np.float32, 0))
    cache.append(tokens, tokens)
    query = tokens[..., -1:, :]
    assert cache.attend(query).isfinite().all()
    if kind == "even":
        cache._n_stored += 1000
        error, said = RuntimeError, "exceeds dimension size"  # of torch, where the rows are taken
    else:
        cache._n_chunks -= 1000
        error, said = IndexError, r"head 0 of this cache should have \d+ rows, but its memory has \d+"
    with pytest.raises(error, match=said):
        cache.attend(query)


@pytest.mark.parametrize("count", [-1, -30_000, -(2**31)])
def test_the_logarithm_of_a_count_below_zero_is_not_looked_up(count):
    """What comes out is of no use; the process lives."""
    keys = torch.from_numpy(make_keys("smooth", (1, 1, 8, 16), np.float32, 0))
    counts = torch.full((1, 1, 8), count, dtype=torch.int32)
    assert cell("attend", "cpp")(keys[..., :1, :], keys, keys, counts, 1, 0.25).isnan().all()
