"""Integers and numbers of NumPy: stored and used as Python's own, so that none overflows, in both packages."""

import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
from caches import make_tiered
from inputs import make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.vllm.rule import PageRule
from kvcluster.fast.vllm.settings import Settings

KINDS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
FLOATS = (np.float16, np.float32, np.float64, np.longdouble, Fraction)
KEYS, VALUES = (make_keys("smooth", (2, 330, 8), np.dtype(np.float32), seed) for seed in range(2))
QUERIES = make_keys("normal", (2, 2, 330, 8), np.dtype(np.float32), 2)
QUERY = QUERIES[:, :, 0]
LARGE = {"n_sink": 100, "n_recent": 70}  # as much together as int8 cannot count
CLUSTERED = {"keep_ratio": 0.5, "chunk_size": 64, **LARGE}
CACHES = {
    "clustered": ("ClusteredCache", CLUSTERED | {"recent_share": 0.25}),
    "whole heads": ("ClusteredCache", CLUSTERED | {"whole_heads": (1,)}),
    "bits": ("ClusteredCache", CLUSTERED | {"bits": (4, 8), "n_exact": 33}),
    "budget": ("BoundedCache", {**CLUSTERED, "chunk_size": 20, "budget": 200}),
    "ragged": ("RaggedCache", {"keep_ratios": (0.25, 0.5), "chunk_size": 64, **LARGE}),
    "chelsea": ("ChelseaCache", {"ratio": 0.5, "max_new_tokens": 100, "n_prompt": 110, "interval": 5, **LARGE}),
    "recall": (
        "RecallCache",
        {"budget": 127, "n_sink": 50, "n_recent": 30, "tokens_per_cluster": 5, "segment_size": 40, "max_iter": 3}
        | {"prompt_segment_size": 100, "spread": 0.5, "init_seed": 120, "bits": 4},
    ),
    "published": ("RecallCache.as_published", {"budget": 100, "seed": 100}),
}
FUNCTIONS = {
    "alternating_partition": ((), {"size": 101}),
    "attended_matching": ((KEYS, VALUES, QUERIES[:, 0, :5, None].repeat(4, axis=2)), {"chunk_size": 66, "n_shared": 3}),
    "chunked_soft_matching": ((KEYS,), {"chunk_size": 100}),
    "distinctive_matching": ((KEYS, VALUES), {"chunk_size": 100, "n_shared": 3}),
    "kmeans": ((KEYS,), {"n_clusters": 101, "max_iter": 3}),
    "quantize": ((KEYS,), {"bits": 8}),
    "select_clusters": ((QUERY, KEYS, np.full((2, 330), 60)), {"budget": 127, "spread": 0.5}),
    "attention": ((QUERY, KEYS, VALUES), {"scale": 0.5}),
}
FUNCTIONS["attended_matching"][1]["share"] = 0.5
for name in ("attended_matching", "chunked_soft_matching", "distinctive_matching"):
    FUNCTIONS[name][1]["keep_ratio"] = 0.5


def as_kind(value, kind):
    """Integers that `kind` can hold, or all floats if it is a kind of floats, as it has them; all else as it is."""
    if isinstance(value, tuple):
        return tuple(as_kind(each, kind) for each in value)
    if kind in FLOATS:
        return kind(value) if isinstance(value, float) else value
    fits = isinstance(value, int) and np.iinfo(kind).min <= value <= np.iinfo(kind).max
    return kind(value) if fits else value


def all_as(parameters, kind):
    return {name: as_kind(value, kind) for name, value in parameters.items()}


def not_of_python(of, name=""):
    """Names of numbers, in what an object holds, that are not Python's own."""
    if isinstance(of, (np.generic, Fraction)):
        return [name]
    if isinstance(of, dict):
        return [found for key, each in of.items() for found in not_of_python(each, f"{name}.{key}")]
    if isinstance(of, (list, tuple)):
        return [found for each in of for found in not_of_python(each, name)]
    return not_of_python(vars(of), name) if type(of).__module__.startswith("kvcluster") else []


def bytes_of(result):
    """Of arrays of either package and what holds them."""
    if isinstance(result, (np.ndarray, torch.Tensor)):
        return np.asarray(result if result.dtype != torch.bfloat16 else result.float()).tobytes()
    if isinstance(result, (list, tuple)):
        return [bytes_of(each) for each in result]
    return bytes_of(list(vars(result).values())) if hasattr(result, "__dict__") else result


def held(package, name, parameters):
    """What a cache with these parameters holds and answers after a prompt, some tokens and a crop; and the cache."""
    cache = operator.attrgetter(name)(package)(**parameters)
    change = to_torch if package is fast else np.asarray
    for first, stop in ((0, 250), (250, 251), (251, 330)):
        cache.append(change(KEYS[:, first:stop]), change(VALUES[:, first:stop]))
    output = cache.attend(change(QUERY))
    arrays = cache.entries(cache.select_clusters(change(QUERY))) if "Recall" in name else cache.entries()
    if package is fast:
        cache.crop(type(parameters["n_recent"])(2) if "n_recent" in parameters else 2)
    return [bytes_of(list(arrays)), bytes_of(output), cache.nbytes, cache.n_seen], cache


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("case", CACHES)
def test_a_cache_is_the_same_with_integers_of_any_kind(case, package):
    name, parameters = CACHES[case]
    expected, _ = held(package, name, parameters)
    for kind in (*KINDS, *FLOATS):
        found, cache = held(package, name, all_as(parameters, kind))
        assert found == expected, kind
        assert not_of_python(cache) == [], kind


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_the_same_with_integers_of_any_kind(name, package):
    arrays, parameters = FUNCTIONS[name]
    arrays = arrays if package is reference else map(to_torch, arrays)
    arrays, function = list(arrays), getattr(package, name)
    expected = bytes_of(function(*arrays, **parameters))
    for kind in (*KINDS, *FLOATS):
        assert bytes_of(function(*arrays, **all_as(parameters, kind))) == expected, kind


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
def test_recall_gives_the_same_with_integers_of_any_kind(package):
    query, keys, values = map(np.asarray if package is reference else to_torch, (QUERY, KEYS, VALUES))
    clusters, parameters = package.kmeans(keys, n_clusters=20), {"budget": 120, "spread": 0.5, "scale": 0.25}
    expected = bytes_of(package.recall_attention(query, keys, values, clusters, **parameters))
    for kind in (*KINDS, *FLOATS):
        found = package.recall_attention(query, keys, values, clusters, **all_as(parameters, kind))
        assert bytes_of(found) == expected, kind


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_methods_and_settings_are_the_same_with_integers_of_any_kind(kind, package):
    assert repr(package.Distinctive(n_shared=kind(3))) == repr(package.Distinctive(n_shared=3))
    attended = package.Attended(share=np.float32(0.25), n_shared=kind(3))
    assert repr(attended) == repr(package.Attended(share=0.25, n_shared=3))
    sizes = {"chunk_size": 64, "n_sink": 32, "n_recent": 100}
    for make in (lambda **of: PageRule(page=as_kind(32, kind), keep_ratio=0.5, **of), lambda **of: Settings(0.5, **of)):
        assert repr(make(**all_as(sizes, kind))) == repr(make(**sizes))
    assert not_of_python(make_tiered(budget=kind(100), n_sink=kind(3), segment_size=kind(40), n_steps=kind(2))) == []


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("wrong", [True, np.True_, np.array(3), "3", 3.0, None], ids=repr)
def test_what_only_looks_like_an_integer_is_refused(wrong, package):
    for make in (
        lambda: package.ClusteredCache(keep_ratio=0.5, n_sink=wrong),
        lambda: package.ChelseaCache(ratio=0.5, max_new_tokens=wrong),
        lambda: package.Distinctive(n_shared=wrong),
    ):
        with pytest.raises(TypeError, match="must be an integer, got "):
            make()


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
def test_ratios_and_factors_beyond_floats_are_refused(package):
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got 1/10000"):
        package.ClusteredCache(keep_ratio=Fraction(1, 10**400))  # 0 as a float
    arrays = [KEYS] * 3 if package is reference else [to_torch(KEYS)] * 3
    with pytest.raises(ValueError, match="scale must be finite, got 10000"):
        package.attention(*arrays, scale=10**400)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint64])
def test_wrong_twin_that_keeps_integers_as_they_come_is_caught(kind, monkeypatch):
    monkeypatch.setattr("kvcluster.fast.memory.spans.check_integer", lambda name, value, least: value)
    monkeypatch.setattr("kvcluster.reference.cache.check_integer", lambda name, value, least: value)
    for package in (reference, fast):
        cache = package.ClusteredCache(**all_as(CLUSTERED, kind))
        assert {".n_sink", ".n_recent"} <= set(not_of_python(cache))
