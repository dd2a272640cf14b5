"""What it means to agree. The only place of the tests with a tolerance; the rule is that of `reference.agreement`."""

import numpy as np
import torch
from inputs import to_numpy

from kvcluster.reference.agreement import EPS, attention_agreement, error_bound, largest_difference


def assert_same_bits(tensor: torch.Tensor, array: np.ndarray) -> None:
    """Same shape, dtype and bytes."""
    ours = to_numpy(tensor)
    assert (ours.shape, ours.dtype) == (array.shape, array.dtype)
    assert ours.tobytes() == array.tobytes()


def attention_agrees(output, query, keys, values, counts=None, *, scale=None) -> bool:
    """Whether an attention output (torch) is within the bound of the oracle."""
    arrays = [to_numpy(tensor) for tensor in (output, query, keys, values)]
    return attention_agreement(*arrays, None if counts is None else to_numpy(counts), scale=scale).holds


def logits_agree(subject: np.ndarray, baseline: np.ndarray, oracle: np.ndarray) -> bool:
    """Whether logits (tokens, vocabulary) are at most twice as wrong as `baseline`, which is float32."""
    errors = [largest_difference(baseline.astype(np.float64), oracle)]
    return bool((largest_difference(subject, oracle) <= error_bound(errors, oracle, EPS["float32"])).all())


def at_most_in_float64(small: float, large: float) -> bool:
    """Whether `small <= large`, up to 64 roundings of the larger size."""
    return bool(small <= large + 64 * np.finfo(np.float64).eps * max(abs(small), abs(large)))


def attention_is_exact(output: np.ndarray, oracle: np.ndarray) -> bool:
    """Whether two float64 computations of attention agree: 16 roundings, half units, of the largest number."""
    return bool(np.abs(output - oracle).max() <= 2.0**-48 * np.abs(oracle).max())


def bounds_are_alike(bound: np.ndarray, other: np.ndarray, dtype: np.dtype) -> bool:
    """Whether bounds differ only as exponentials of two libraries make them: in float32 by less than twice."""
    return bool((np.abs(np.log2(bound / other)) < (1 if dtype == np.float32 else 2.0**-20)).all())


def equal_in_float64(output: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two ways to compute the same thing in float64 agree: 64 roundings of the largest number."""
    return equal_up_to_rounding(output, expected, np.float64)


def equal_in_float32(output: np.ndarray, expected: np.ndarray) -> bool:
    """The same of two ways in float32."""
    return equal_up_to_rounding(output, expected, np.float32)


def scores_agree(score: float, expected: float) -> bool:
    """Whether scores of an answer are the same: ROUGE adds 1e-8 to what it divides by."""
    return abs(score - expected) <= 1e-7


def numbers_agree(numbers: list[float], expected: list[float]) -> bool:
    """`equal_in_float64` of plain numbers."""
    return equal_in_float64(np.array(numbers, dtype=np.float64), np.array(expected, dtype=np.float64))


def equal_up_to_rounding(output: np.ndarray, expected: np.ndarray, dtype: type) -> bool:
    assert output.shape == expected.shape
    assert output.dtype == expected.dtype == dtype
    return bool(np.abs(output - expected).max() <= 64 * np.finfo(dtype).eps * np.abs(expected).max())
