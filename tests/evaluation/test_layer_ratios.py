"""Entries shared out over layers: how many each gets, and that none are lost or made."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ablation.layer_ratios import READING_LAYERS, layer_ratios


def entries(ratios, chunk_size=256):
    """What the cache makes of the ratios."""
    return [math.ceil(ratio * chunk_size) for ratio in ratios]


@pytest.mark.parametrize(
    ("keep_ratio", "first", "second", "others"),
    [(0.4667, [256] * 9, [], 60), (0.2, [256] * 4, [81] * 5, 5), (0.1467, [256] * 2, [72] * 7, 5)],
)
def test_a_few_stay_whole_others_get_a_middle_share(keep_ratio, first, second, others):
    made = entries(layer_ratios(READING_LAYERS, n_layers=30, keep_ratio=keep_ratio))
    assert [made[layer] for layer in READING_LAYERS] == first + second
    assert {n for layer, n in enumerate(made) if layer not in READING_LAYERS} == {others}


@given(st.data())
def test_never_more_than_the_share_and_little_less(data):
    n_layers, chunk_size = data.draw(st.integers(1, 40)), data.draw(st.integers(8, 300))
    reading = data.draw(st.permutations(range(n_layers)))[: data.draw(st.integers(0, n_layers))]
    keep_ratio = data.draw(st.floats(0.1, 1.0))
    least = data.draw(st.integers(1, max(1, int(keep_ratio * chunk_size))))
    if keep_ratio * chunk_size < 1 or int(keep_ratio * chunk_size * n_layers) < least * n_layers:
        return
    middle = data.draw(st.integers(least, chunk_size))
    given_ratios = {"n_layers": n_layers, "keep_ratio": keep_ratio, "chunk_size": chunk_size}
    made = entries(layer_ratios(reading, **given_ratios, n_least=least, n_middle=middle), chunk_size)
    assert sum(made) <= keep_ratio * chunk_size * n_layers
    assert all(least <= n <= chunk_size for n in made)
    if 0 < len(reading) < n_layers and made[reading[-1]] < chunk_size:
        assert sum(made) > int(keep_ratio * chunk_size * n_layers) - len(reading)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reading_layers": [3, 3]}, r"reading_layers must be different layers from 0 to 7, got \[3, 3\]"),
        ({"reading_layers": [8]}, r"reading_layers must be different layers from 0 to 7, got \[8\]"),
        ({"keep_ratio": 0}, r"keep_ratio must be in \(0, 1\], got 0"),
        ({"keep_ratio": 0.01}, r"keep_ratio \* chunk_size must be at least n_least, got 0.01 \* 256 < 5"),
        ({"n_least": 0}, "n_least must be at least 1, got 0"),
        ({"n_middle": 3}, "n_middle must be at least 5, got 3"),
    ],
)
def test_bad_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        layer_ratios(**{"reading_layers": [3], "n_layers": 8, "keep_ratio": 0.5} | change)
