"""The canonical similarity inside a kernel: `kvcluster.reference.similarity`, bit for bit."""

import triton
import triton.language as tl

__all__ = ["canonical_similarity", "halving_sum"]


@triton.jit
def halving_sum(terms, ROWS: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr):
    """Sum of each row of `terms` (ROWS, DIM), float64, DIM = 2**STEPS: halves are added until one number is left."""
    for step in tl.static_range(STEPS):
        terms = tl.sum(tl.reshape(terms, (ROWS, 2, DIM >> (step + 1))), axis=1)  # low half + high half: one addition
    return tl.reshape(terms, (ROWS,))


@triton.jit
def canonical_similarity(a, b, ROWS: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr):
    """Signed squared cosine of each row of `a` with the same row of `b`, (ROWS, DIM) both, float64, zero-padded."""
    dot = halving_sum(a * b, ROWS, DIM, STEPS)
    norms = halving_sum(a * a, ROWS, DIM, STEPS) * halving_sum(b * b, ROWS, DIM, STEPS)  # both squared
    return tl.where(norms == 0, 0.0, dot * tl.abs(dot) / tl.where(norms == 0, 1.0, norms))
