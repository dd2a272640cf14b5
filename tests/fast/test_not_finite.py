"""One NaN or infinity anywhere is refused in the reference's words, and no finite number is."""

import functools
import itertools
import shutil

import numpy as np
import pytest
import torch
from inputs import DTYPES, make_keys, slowly, to_numpy, to_torch
from patches import twin_of

from kvcluster import fast, reference
from kvcluster.fast import arguments
from kvcluster.fast.backends import cell
from kvcluster.fast.cpu import compiling
from kvcluster.fast.plain import attention as plain

TOKENS, DIM = 70, 16  # two blocks of C++
BACKENDS = ["torch", "cpp", "triton"]
FAULTS = list(itertools.product((np.nan, np.inf, -np.inf), (0, 0.5, 1)))
COUNTS = np.arange(2 * TOKENS).reshape(2, TOKENS) % 3  # the first is 0
RATIO = {"keep_ratio": 0.5, "chunk_size": 8}
SHAPES = {"query": 3, "a": 3, "b": 5, "centroids": 9, "deviations": 9, "init": 4, "queries": 2}


def clusters_of(package, keys):
    """Any clustering of keys that may be bad."""
    good = keys.isfinite() if package is fast else np.isfinite(keys)
    good = torch.where(good, keys, 1) if package is fast else np.where(good, keys, 1).astype(keys.dtype)
    return package.kmeans(good, n_clusters=4)


def merged(package, array):
    labels, counts = np.arange(TOKENS) // 2, np.full(TOKENS // 2, 2)
    labels, counts = (np.broadcast_to(x, (2, len(x))).copy() for x in (labels, counts))
    return package.merge(
        array, package.Clustering(*((labels, counts) if package is reference else map(to_torch, (labels, counts))))
    )


def counts_of(package, of):
    counts = COUNTS[:, :of]
    return counts if package is reference else to_torch(counts.copy())


FUNCTIONS = {  # by name: arguments that are floats, and the call
    "attention": (["query", "keys", "values"], lambda p, *x, **b: p.attention(*x, **b)),
    "clustered_attention": (
        ["query", "keys", "values"],
        lambda p, *x, **b: p.clustered_attention(*x, counts_of(p, TOKENS), **b),
    ),
    "recall_attention": (
        ["query", "keys", "values"],
        lambda p, *x, **b: p.recall_attention(*x, clusters_of(p, x[1]), budget=9, **b),
    ),
    "similarity": (["a", "b"], lambda p, *x: p.similarity(*x)),
    "chunked_soft_matching": (["keys"], lambda p, *x, **b: p.chunked_soft_matching(*x, **RATIO, **b)),
    "merge": (["array"], lambda p, *x: merged(p, *x)),
    "distinctive_matching": (["keys", "values"], lambda p, *x, **b: p.distinctive_matching(*x, **RATIO, **b)),
    "kmeans": (["keys", "init"], lambda p, keys, init, **b: p.kmeans(keys, n_clusters=4, init=init, **b)),
    "select_clusters": (
        ["query", "centroids", "deviations"],
        lambda p, *x, **b: p.select_clusters(*x[:2], counts_of(p, 9), budget=9, deviations=x[2], **b),
    ),
    "quantize": (["array"], lambda p, *x: p.quantize(*x, bits=4)),
}
BACKENDS_OF = {
    "attention": BACKENDS,
    "clustered_attention": BACKENDS,
    "recall_attention": ["torch", "triton"],
    "chunked_soft_matching": ["torch", "triton"],
    "distinctive_matching": ["torch", "triton"],
    "kmeans": ["torch", "triton"],
    "select_clusters": ["torch", "triton"],
}
CASES = [
    (slowly if backend == "triton" and (name, dtype) != ("clustered_attention", "f32") else pytest.param)(
        name, backend, dtype
    )
    for name in FUNCTIONS
    for backend in BACKENDS_OF.get(name, [None])
    for dtype in DTYPES
]


def arrays_of(names, dtype, tokens=TOKENS):
    """Query and its like are positive: a key of minus infinity then has no weight, and the output does not show it."""
    shapes = [(2, SHAPES.get(name, tokens), DIM) for name in names]
    first, *others = [make_keys("normal", shape, DTYPES[dtype], seed) for seed, shape in enumerate(shapes)]
    return [np.abs(first), *others]


def with_fault(array, fault, place):
    """A copy with `fault` at the first, middle or last place."""
    copy = array.copy()
    copy.reshape(-1)[int(place * (copy.size - 1))] = fault
    return copy


def strided(tensor):
    """The same numbers in memory with gaps between rows and another order of the leading axes."""
    room = torch.zeros(tensor.shape[1], tensor.shape[0], tensor.shape[2] + 3, dtype=tensor.dtype)
    view = room.transpose(0, 1)[..., 1 : 1 + tensor.shape[2]]
    return view.copy_(tensor)


def said_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "not refused"


def missed(call, names, arrays, *, lay=(lambda x: x, strided)):
    """Faults that `call` does not refuse in the words that are right: argument, fault, place, whether strided."""
    found = []
    for i, name in enumerate(names):
        for (fault, place), way in itertools.product(FAULTS, lay):
            bad = [with_fault(x, fault, place) if i == j else x for j, x in enumerate(arrays)]
            said = said_of(call, *(way(to_torch(x)) for x in bad))
            if said != f"{name} must be finite, got 1 NaN or infinite values":
                found.append((name, fault, place, way is strided, said))
    return found


@pytest.mark.parametrize(("name", "backend", "dtype"), CASES)
def test_one_number_that_is_not_finite_is_refused_wherever_it_is(name, backend, dtype):
    names, call = FUNCTIONS[name]
    options = {} if backend is None else {"backend": backend}
    arrays = arrays_of(names, dtype)
    call(fast, *map(to_torch, arrays), **options)
    ways = {"lay": [strided]} if backend == "triton" else {}
    assert missed(functools.partial(call, fast, **options), names, arrays, **ways) == []
    bad = with_fault(arrays[-1], -np.inf, 0.5)
    words = f"{names[-1]} must be finite, got 1 NaN or infinite values"
    assert said_of(call, reference, *arrays[:-1], bad) == words


@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_in_every_split_of_many_entries_are_found(dtype):
    """Splits of C++ have 2048 entries."""
    names, call = FUNCTIONS["attention"]
    arrays = arrays_of(names, dtype, tokens=4200)
    assert missed(functools.partial(call, fast, backend="cpp"), names, arrays) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_several_faults_the_first_is_named(backend):
    """In the reference's order: each array alone, then how they fit, then counts, then scale."""
    query, keys, values = arrays_of(["query", "keys", "values"], "f32")
    bad = with_fault(keys, np.nan, 0.5)
    wrong = {
        "values of other tokens": ((query, bad, values[:, 1:], COUNTS), {}),
        "values of a wrong dtype": ((query, bad, values.astype(np.float64), COUNTS), {}),
        "counts of a wrong shape": ((query, bad, values, COUNTS[:, 1:]), {}),
        "a scale that is no number": ((query, bad, values, COUNTS), {"scale": "half"}),
        "a query of no rows": ((query[:, :0], bad, values, COUNTS), {}),
    }
    for name, (arrays, options) in wrong.items():
        expected = said_of(reference.clustered_attention, *arrays, **options)
        assert "keys must be finite" in expected, name
        tensors = map(to_torch, arrays)
        assert said_of(fast.clustered_attention, *tensors, **options, backend=backend) == expected, name


def extremes(dtype):
    """Query, keys, values and the answer: products and sums that float32 cannot hold where `dtype` is as wide."""
    largest = torch.finfo(to_torch(np.zeros(1, DTYPES[dtype])).dtype).max
    signs = np.sign(make_keys("normal", (2, TOKENS, DIM), np.dtype(np.float64), seed=5))
    big = (largest * signs).astype(DTYPES[dtype])
    ones, whole = np.ones_like(big), np.full_like(big, largest)
    return {
        "one key with all weight": (big[:, :3], big, big, big[:, :3]),
        "no product above minus infinity": (whole[:, :3], -whole, ones, ones[:, :3]),
        "the largest values": (ones[:, :3], ones[:, :64], whole[:, :64], whole[:, :3]),  # of weight 1/64 each
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_finite_numbers_are_no_infinities(backend, dtype):
    for name, (*arrays, expected) in extremes(dtype).items():
        counts = np.ones(arrays[1].shape[:2], dtype=np.int64)
        for package, convert in ((reference, np.copy), (fast, to_torch)):
            options = {"backend": backend} if package is fast else {}
            whole = package.attention(*map(convert, arrays), **options)
            clustered = package.clustered_attention(*map(convert, (*arrays, counts)), **options)
            for output in (whole, clustered):
                output = to_numpy(output) if package is fast else output.astype(DTYPES[dtype])
                assert np.array_equal(output, expected), (name, package)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_overflow_are_looked_at_again(dtype):
    for _, keys, values, _ in extremes(dtype).values():
        for array in (keys, values, np.tile(values, (1, 40, 1))):
            arguments.check_array("array", to_torch(array))
            assert said_of(arguments.check_array, "array", to_torch(with_fault(array, np.nan, 1))) != "not refused"


CACHES = {
    "ClusteredCache": RATIO | {"n_sink": 1, "n_recent": 4},
    "RaggedCache": {"keep_ratios": (0.5, 1.0), "chunk_size": 8, "n_sink": 1, "n_recent": 4},
    "RecallCache": {"budget": 40, "n_sink": 0, "segment_size": 16, "tokens_per_cluster": 4},
    "ChelseaCache": {"ratio": 0.5, "max_new_tokens": 300, "interval": 2, "chunk_size": 8, "n_sink": 2, "n_recent": 4},
}


def filled(package, kind, arrays):
    cache = getattr(package, kind)(**CACHES[kind])
    cache.append(*arrays)
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_refuses_what_is_not_finite_and_is_as_it_was(kind, dtype):
    query, keys, values = arrays_of(["query", "keys", "values"], dtype)
    cache = filled(fast, kind, map(to_torch, (keys, values)))
    before = cache.n_seen, cache.nbytes, cache.attend(to_torch(query))
    for n_tokens in (1, TOKENS):
        new = keys[:, :n_tokens], values[:, :n_tokens]
        assert missed(cache.append, ["keys", "values"], new) == []
    assert missed(cache.attend, ["query"], [query]) == []
    assert (cache.n_seen, cache.nbytes) == before[:2]
    assert torch.equal(cache.attend(to_torch(query)), before[2])
    oracle = filled(reference, kind, (keys, values))
    bad = with_fault(values, np.nan, 1)
    assert said_of(oracle.append, keys, bad) == said_of(cache.append, *map(to_torch, (keys, bad)))


OUTPUT, PRODUCTS = " and bool(output.detach().isfinite().all())", "all(math.isfinite(number) for number in lowest)"
WRONG = {
    "values are not looked at": (plain, (OUTPUT, "")),
    "keys of no weight are not looked at": (plain, (PRODUCTS, "True")),
    "nothing but the first block is": (plain, ("logits.detach().amin()", "logits.detach()[..., :64].amin()")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_of_attention_are_told_apart(name, dtype, monkeypatch):
    module, change = WRONG[name]
    monkeypatch.setattr(plain, "attend_checked", twin_of(module, change)["attend_checked"])
    names, call = FUNCTIONS["clustered_attention"]
    assert missed(functools.partial(call, fast, backend="torch"), names, arrays_of(names, dtype))


def test_a_wrong_twin_of_the_kernel_is_told_apart(monkeypatch):
    """It looks at the output alone."""
    from kvcluster.fast.kernels import attention as kernels

    def of_output(*problem):
        output = cell("attend", "triton")(*problem)
        return output, bool(output.isfinite().all())

    monkeypatch.setattr(kernels, "attend_checked", of_output)
    names, call = FUNCTIONS["attention"]
    found = missed(functools.partial(call, fast, backend="triton"), names, arrays_of(names, "f32"), lay=[strided])
    assert {(name, said) for name, *_, said in found} == {("keys", "not refused")}


ARRAY = "array = array.detach()"
WRONG_CHECKS = {
    "keys alone": ('    check_array("values", values)\n    if values', "    if values"),
    "the first block alone": (ARRAY, f"{ARRAY}[..., :64, :]"),
    "the first feature alone": (ARRAY, f"{ARRAY}[..., :1]"),
    "NaN alone": ("    if not all(math.isfinite(number)", "    if any(math.isnan(number)"),
    "what is large alone": ("array.aminmax()", "(array.amax(),)"),
}


@pytest.mark.parametrize("name", WRONG_CHECKS)
def test_wrong_twins_of_the_check_are_told_apart(name):
    twin = twin_of(arguments, WRONG_CHECKS[name])
    pairs = arrays_of(["keys", "values"], "f16", tokens=300)
    assert missed(lambda *pair: arguments.check_append(*pair, None), ["keys", "values"], pairs) == []
    assert missed(lambda *pair: twin["check_append"](*pair, None), ["keys", "values"], pairs)


WRONG_IN_CPP = {
    "keys of no weight": ("entries.h", "            zeros += logits * 0.0f;\n", ""),
    "the last keys of a block": ("entries.h", "            zeros[0] += weights[r][i] * 0.0f;\n", ""),
    "values": ("attention.cpp", "zeros += output[i] * 0.0f", "zeros += 0.0f"),
    "all but the first split": (
        "attention.cpp",
        "        zeros += attend_split",
        "        float others = 0.0f;\n        (split ? others : zeros) += attend_split",
    ),
}


@pytest.mark.slow  # each is compiled
@pytest.mark.parametrize("name", WRONG_IN_CPP)
def test_wrong_twins_of_cpp_are_told_apart(name, monkeypatch, tmp_path):
    file, right, wrong = WRONG_IN_CPP[name]
    sources = tmp_path / "sources"
    shutil.copytree(compiling.FOLDER, sources, ignore=shutil.ignore_patterns("*.py*"))
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(compiling, "FOLDER", sources)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path)
    changed = compiling.library.__wrapped__("attention")
    monkeypatch.setattr("kvcluster.fast.cpu.attention.library", lambda _: changed)
    names, call = FUNCTIONS["attention"]
    assert missed(functools.partial(call, fast, backend="cpp"), names, arrays_of(names, "f32", tokens=4199))
