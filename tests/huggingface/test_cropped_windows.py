"""What remains after `crop` where little or nothing is left: windows that have slid, rows of padding alone."""

import pytest
import torch
from models import greedy, random_tokens, tiny_gemma, tiny_llama

from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache

SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}
MAKERS = {
    "clustered": lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, **SIZES),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=0.5, max_new_tokens=0, whole_heads=(), **SIZES),
    "recall": lambda model: RecallCache.for_model(model, budget=60, n_sink=3, segment_size=20),
}


def read(model, cache, n, mask=None):
    tokens = random_tokens(n, batch=1 if mask is None else len(mask))
    with torch.no_grad():
        model(tokens, past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_has_left_a_sliding_window_does_not_come_back_and_nothing_is_lost(kind):
    model = tiny_gemma(window=48)
    cache, other = MAKERS[kind](model), MAKERS[kind](model)
    cache.crop(0)
    for n in (30, 17):
        read(model, cache, n)
        read(model, other, n)
    assert cache.n_croppable > 0  # 47 tokens, of which each is in the windows
    for each in (cache, other):
        read(model, each, 1)
    assert cache.n_croppable == 0
    with pytest.raises(ValueError, match=r"crop must remove at most the 0 tokens .* got 1"):
        cache.crop(-1)
    cache.crop(0)
    for each in (cache, other):
        read(model, each, 3)
    assert all(map(torch.equal, (x.keys for x in cache.layers), (x.keys for x in other.layers)))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_of_padding_alone_is_saved_and_goes_on(kind, tmp_path):
    model, mask = tiny_llama(), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    cache = MAKERS[kind](model)
    read(model, cache, 30, mask[:, :30])
    cache.crop(-15)
    cache.save(tmp_path / "cache")
    loaded = type(cache).load(tmp_path / "cache", model)
    for each in (cache, loaded):
        read(model, each, 45, mask)
        assert each.padding == [0, 20]
    for ours, right in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, right.keys)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("kind", MAKERS)
def test_an_empty_cache_is_saved_after_all_of_it_was_cropped(kind, make, tmp_path):
    model = make()
    cache = MAKERS[kind](model)
    read(model, cache, 12)
    cache.crop(-12)
    cache.save(tmp_path / "cache")
    assert type(cache).load(tmp_path / "cache", model).n_seen == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_without_padding_go_on_when_those_with_it_are_gone(kind):
    """From then on transformers passes no mask."""
    model, tokens = tiny_llama(), random_tokens(40)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    cache, alone = MAKERS[kind](model), MAKERS[kind](model)
    with torch.no_grad():
        model(tokens[:, :30].repeat(2, 1), past_key_values=cache, attention_mask=mask)
        model(tokens[:, :30], past_key_values=alone)
    cache.batch_select_indices(torch.tensor([0]))
    ours, right = (greedy(model, tokens, n_new=6, past_key_values=each) for each in (cache, alone))
    assert torch.equal(ours, right)
    assert cache.n_seen == alone.n_seen
