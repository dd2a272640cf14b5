"""Attacks on the claims E1 to E7 of README.md: each check looks for a counterexample and says how near it came.

A check takes as its argument the thing that the claim is about, so that the tests can hand in a false one and see
the check fail.
"""

import math
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
import torch

from kvcluster import fast, reference
from kvcluster.fast.exact import mean as exact_mean
from kvcluster.fast.exact import similarity as exact_similarity
from kvcluster.reference.similarity import halving_sum

from ..claims import Check
from .inputs import chunks_of_tokens, keys_of_kinds, near_ties

__all__ = [
    "check_bits_of_similarity",
    "check_cut",
    "check_decisions",
    "check_filter",
    "check_halving_sum",
    "check_margin",
    "check_matches",
    "check_order_of_similarity",
    "check_products",
    "check_sums",
    "check_torch_halving_sum",
]

U, U64 = 2.0**-24, 2.0**-53  # unit roundoffs of float32 and float64
LARGEST_DIM = 8192  # of E4
TENSOR_CORE_UNIT = 2.0**-21  # of products of 16-bit keys in the Triton kernels
DIGITS = Context(prec=60)


def check_products(dtype: type = np.float32) -> Check:
    """E1: random bit patterns, the smallest and the largest numbers; exact products and fused multiply-adds."""
    rng = np.random.default_rng(1)
    info = np.finfo(dtype)
    extremes = [info.smallest_subnormal, info.smallest_normal, info.max, -info.max, np.nextafter(dtype(1), dtype(2))]
    random: np.ndarray = np.frombuffer(rng.bytes(4000 * info.bits // 8), dtype=dtype)
    numbers = np.concatenate([np.array(extremes, dtype=dtype), random[np.isfinite(random)]]).astype(np.float64)
    a, b, c = numbers, rng.permutation(numbers), rng.permutation(numbers)
    a[:25], b[:25] = np.repeat(numbers[:5], 5), np.tile(numbers[:5], 5)  # each extreme with each
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        products, sums = a * b, a * b + c
    wrong = 0
    for x, y, z, product, total in zip(*(array.tolist() for array in (a, b, c, products, sums)), strict=True):
        exact = Fraction(x) * Fraction(y)
        is_exact = math.isfinite(product) and Fraction(product) == exact
        wrong += not (is_exact and float(exact + Fraction(z)) == total)  # what a fused multiply-add returns
    return Check("E1", "products rounded, or changed by FMA", len(a), wrong, 0)


def check_halving_sum(summation: Callable = halving_sum) -> Check:
    """E2: the tree written once more on Python's numbers, bit for bit; its error, exactly; more padding."""
    rng = np.random.default_rng(2)
    worst, cases = 0.0, 0
    for dim in (1, 2, 3, 5, 64, 80, 127, 128, 1000):
        for spread in (0, 1, 40):
            terms = rng.standard_normal((4, dim)) * 2.0 ** rng.integers(-spread, spread + 1, (4, dim))
            terms[0] = terms[0, rng.permutation(dim)] * (-1.0) ** np.arange(dim)
            sums, padded = (summation(np.pad(terms, ((0, 0), (0, zeros)))).tolist() for zeros in (0, 3 * dim))
            for row, result, same in zip(terms.tolist(), sums, padded, strict=True):
                exact, size = sum(map(Fraction, row)), sum(abs(Fraction(term)) for term in row)
                error = float(abs(Fraction(result) - exact) / size)
                allowed = gamma((dim - 1).bit_length(), U64)
                ratio = error / allowed if allowed else error  # of one term, the sum is exact
                worst, cases = max(worst, ratio if result == same == tree_sum(row) else math.inf), cases + 1
    return Check("E2", "error / bound (inf: other bits)", cases, worst, 1)


def check_torch_halving_sum() -> Check:
    """E2 on torch tensors."""
    return check_halving_sum(lambda terms: exact_similarity.halving_sum(torch.from_numpy(terms)).numpy())


def tree_sum(terms: list[float]) -> float:
    """The halving sum by recursion, in Python's floats."""
    if len(terms) == 1:
        return terms[0]
    half = 1 << ((len(terms) - 1).bit_length() - 1)
    terms = terms + [0.0] * (2 * half - len(terms))
    return tree_sum([low + high for low, high in zip(terms[:half], terms[half:], strict=True)])


def gamma(n: int, unit: float) -> float:
    return n * unit / (1 - n * unit)


def check_bits_of_similarity(similarity: Callable | None = None) -> Check:
    """E3, same bits: the reference beside torch (or `similarity`), also where the quotient underflows."""
    similarity = similarity or (lambda a, b: fast.similarity(torch.from_numpy(a), torch.from_numpy(b)).numpy())
    wrong = cases = 0
    for dim in (1, 2, 3, 64, 80, 127):
        kinds = list(keys_of_kinds(8, dim, seed=dim))
        kinds += [kinds[0] * np.float32(scale) for scale in (0, 1e37, 1e-40)]
        for keys in kinds:
            ours = similarity(keys, keys)
            wrong += ours.tobytes() != reference.similarity(keys, keys).tobytes() or not bool(np.isfinite(ours).all())
            cases += 1
    low, high = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    for dim, first, second in ((1 << 20, high, high), (1 << 20, low, low), (1 << 20, high, low)):
        a, b = (np.full((1, dim), x, dtype=np.float32) for x in (first, second))
        wrong, cases = wrong + bool(similarity(a, b)[0, 0] != 1), cases + 1
    a, b = (np.array([x], dtype=np.float32) for x in ([high, low, 0], [0, low, high]))  # cosine of about 2**-554
    return Check("E3", "similarities whose bits differ", cases + 1, wrong + bool(similarity(a, b)[0, 0] != 0), 0)


def check_order_of_similarity(similarity: Callable = reference.similarity) -> Check:
    """E3, order: signed root of the canonical similarity beside the exact cosine, in units of its error bound."""
    worst, cases = 0.0, 0
    for dim in (1, 2, 3, 64, 100, 256):
        bound = (2 * (dim - 1).bit_length() + 2) * U64
        for keys in keys_of_kinds(6, dim, seed=dim):
            scores = similarity(keys[0::2], keys[1::2])
            for (i, j), score in np.ndenumerate(scores):
                cosine = exact_cosine(keys[2 * i], keys[2 * j + 1])
                root = DIGITS.sqrt(Decimal(abs(float(score)))).copy_sign(Decimal(float(score)))
                worst, cases = max(worst, float(abs(DIGITS.subtract(root, cosine))) / bound), cases + 1
    return Check("E3", "|root - cosine| / bound", cases, worst, 1)


def exact_cosine(a: np.ndarray, b: np.ndarray) -> Decimal:
    """To 60 digits, from rational sums."""
    left, right = ([Fraction(float(x)) for x in row] for row in (a, b))
    dot = sum(x * y for x, y in zip(left, right, strict=True))
    square = Fraction(dot * dot) / (sum(x * x for x in left) * sum(y * y for y in right))
    root = DIGITS.sqrt(DIGITS.divide(Decimal(square.numerator), Decimal(square.denominator)))
    return -root if dot < 0 else root


def delta(dim: int) -> float:
    """E4: how wrong a cosine of the filter can be."""
    return (2 * dim + 27) * U


def filter_as_coded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (left, _), (right, _) = (exact_similarity.normalized(torch.from_numpy(keys)) for keys in (a, b))
    return (left @ right.mT).numpy()


def filter_in_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One float32 addition after the other, the most errors that a sum can make."""
    a, b = (keys / np.sqrt(sum_in_order(keys * keys))[:, None] for keys in (a, b))
    return sum_in_order(a[:, None] * b[None])


def filter_products_first(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As in the Triton kernels: the keys as they are, then the norms; what is subnormal is flushed to zero."""
    inverse_a, inverse_b = (1 / np.sqrt(sum_in_order(flushed(keys * keys))) for keys in (a, b))
    return sum_in_order(flushed(flushed(a)[:, None] * flushed(b)[None])) * inverse_a[:, None] * inverse_b[None]


def sum_in_order(terms: np.ndarray) -> np.ndarray:
    return np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1]


def flushed(array: np.ndarray) -> np.ndarray:
    return np.where(np.abs(array) < 2.0**-126, np.float32(0), array)


def check_filter(bound: Callable[[int], float] = delta) -> Check:
    """E4, error: the filter in several orders of summation beside the cosine in float64, in units of `bound`."""
    rng = np.random.default_rng(4)
    worst, cases = 0.0, 0
    for dim in (1, 3, 64, 128, 1000, 4096):
        keys = [*keys_of_kinds(8, dim, seed=dim), rng.uniform(1, 1.001, (8, dim)).astype(np.float32)]
        keys += [keys[0] * np.float32(2.0**-30 * dim**-0.5), keys[0] * np.float32(2.0**30 * dim**-0.5)]
        keys += [np.where(np.arange(dim) == 0, 2.0**-39, normal * 2.0**-70).astype(np.float32) for normal in keys[:1]]
        for a, b in ((kind[0::2], kind[1::2]) for kind in keys):
            score = reference.similarity(a, b)
            cosine = np.sign(score) * np.sqrt(np.abs(score))  # with an error of less than 30 units of float64
            for cosine_filter in (filter_as_coded, filter_in_order, filter_products_first):
                for order in (np.arange(dim), rng.permutation(dim)):
                    filtered = cosine_filter(np.ascontiguousarray(a[:, order]), np.ascontiguousarray(b[:, order]))
                    worst = max(worst, float(np.abs(filtered - cosine).max()) / bound(dim))
                    cases += filtered.size
    return Check("E4", "|filter - cosine| / bound", cases, worst, 1)


def check_margin(margin: Callable = exact_similarity.margin) -> Check:
    """E4, margin: what the proof asks for, and what the code takes, for every dim and every kind of matrix product."""
    dim = np.arange(1, LARGEST_DIM + 1, dtype=np.float64)
    norms = (dim + 18) * U + (dim + 32) * U**2 + dim * 2.0**-40  # logarithm of all factors but the product's
    products = {  # how wrong a matrix product can be, as a factor
        U: dim * U,
        2.0**-8: np.log1p(8 * dim * U) + 2 * math.log1p(2.0**-8),
        TENSOR_CORE_UNIT: np.log1p(8 * dim * U),
    }
    worst = -math.inf
    for unit, product in products.items():
        margins = np.array([margin(int(n), unit) for n in dim])
        needed = 2 * (np.expm1(norms + product) + dim * 2.0**-39) + U * (1.1 + margins) + 84 * U64
        worst = max(worst, float((needed - margins).max()) / U)
    return Check("E4", "margin that is missing / 2**-24", len(products) * len(dim), worst, 0)


def check_matches(find: Callable = exact_similarity.certified_matches) -> Check:
    """E4, decisions: each source's best destination, of ties the first."""
    sources, destinations = near_ties(seed=40)
    destination = find(torch.from_numpy(sources), torch.from_numpy(destinations)).destination.numpy()
    wrong = destination != reference.similarity(sources, destinations).argmax(axis=-1)
    return Check("E4", "wrong matches", wrong.size, int(wrong.sum()), 0)


def check_cut(top: Callable = exact_similarity.certified_top) -> Check:
    """E5: the sources above the cut, wherever the cut is; some chunks hold a key that float32 cannot measure."""
    sources, destinations = near_ties(seed=50)
    sources[::5, 3] *= np.float32(2.0**-60)
    tensors = torch.from_numpy(sources), torch.from_numpy(destinations)
    best = reference.similarity(sources, destinations).max(axis=-1)
    expected = np.argsort(-best, axis=-1, kind="stable")
    wrong = cases = 0
    for n_top in range(1, sources.shape[1] + 1):
        chosen = top(exact_similarity.certified_matches(*tensors), *tensors, n_top).numpy()
        differs = np.sort(chosen, axis=-1) != np.sort(expected[:, :n_top], axis=-1)
        wrong, cases = wrong + int(differs.any(axis=-1).sum()), cases + len(sources)
    return Check("E5", "wrong cuts", cases, wrong, 0)


def check_sums(is_exact: Callable = exact_mean.sums_are_exact) -> Check:
    """E6: sums of random clusters in random orders, and by one-hot matrix products, beside the ascending order."""
    rng = np.random.default_rng(6)
    wrong = cases = 0
    for chunk in (chunk for _ in range(8) for chunk in chunks_of_tokens(rng)):
        if not bool(is_exact(torch.from_numpy(chunk)[None])[0]):
            continue
        tokens = chunk.astype(np.float64)
        is_member = np.eye(4)[:, rng.integers(0, 4, len(chunk))]  # (4, tokens)
        is_member = np.stack([np.ones(len(chunk)), *(row for row in is_member if row.any())])  # first all of them
        ascending = np.stack([sum_ascending(tokens[row > 0]) for row in is_member])
        orders = [np.arange(len(chunk))[::-1], *(rng.permutation(len(chunk)) for _ in range(4))]
        others = [np.stack([sum_ascending(tokens[order][row[order] > 0]) for row in is_member]) for order in orders]
        others += [(torch.from_numpy(is_member) @ torch.from_numpy(tokens)).numpy(), is_member @ tokens]
        wrong, cases = wrong + sum(o.tobytes() != ascending.tobytes() for o in others), cases + len(others)
    return Check("E6", "sums that differ", cases, wrong, 0)


def sum_ascending(tokens: np.ndarray) -> np.ndarray:
    return np.add.accumulate(tokens, axis=0)[-1]


def check_decisions() -> Check:
    """E7: labels, counts and centroids of the torch path, byte for byte, on every kind of keys."""
    wrong = cases = 0
    for dim in (1, 64, 80):
        for kind in keys_of_kinds(70, dim, seed=70 + dim):
            for keys, keep_ratio in ((kind, 0.25), (kind.astype(np.float16), 0.6), (kind * np.float32(1e-38), 0.25)):
                ours = compress_by_torch(keys, keep_ratio)
                clustering = reference.chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=32)
                expected = clustering.labels, clustering.counts, reference.merge(keys, clustering)
                wrong += any(a.tobytes() != b.tobytes() for a, b in zip(ours, expected, strict=True))
                cases += 1
    return Check("E7", "clusterings that differ", cases, wrong, 0)


def compress_by_torch(keys: np.ndarray, keep_ratio: float) -> tuple[np.ndarray, ...]:
    tensor = torch.from_numpy(keys)
    clustering = fast.chunked_soft_matching(tensor, keep_ratio=keep_ratio, chunk_size=32, backend="torch")
    centroids = fast.merge(tensor, clustering, backend="torch")
    return tuple(t.numpy() for t in (clustering.labels, clustering.counts, centroids))
