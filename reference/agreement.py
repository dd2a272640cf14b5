"""The bound that attention outputs of other implementations are held to.

Cluster assignments, counts and centroids must be identical, bit for bit. Attention outputs cannot be:
exponentials and sums are rounded differently everywhere. Three computations settle what is allowed:

* the *oracle*: `attention` or `clustered_attention` of this package, float64 on the inputs as they are;
* the *baseline*: the plain formula in the dtype of the implementation, with no trick at all;
* the *subject*: the implementation under test.

The subject may be twice as wrong as the baseline, plus twice one rounding of the largest output. This is
the only tolerance of the project.
"""

import numpy as np
from jaxtyping import Float, Float64

__all__ = ["attention_error", "attention_error_bound"]


def attention_error(
    output: Float[np.ndarray, "*lead queries dim"], oracle: Float64[np.ndarray, "*lead queries dim"]
) -> Float64[np.ndarray, "*lead"]:
    """Largest absolute difference from the oracle, per leading index (head).

    Raises
    ------
    ValueError : another shape than the oracle's; NaN or infinity in `output`.

    Examples
    --------
    >>> attention_error(np.array([[1.0, 2.5]]), np.array([[1.0, 2.0]]))
    np.float64(0.5)
    """
    if output.shape != oracle.shape:
        raise ValueError(f"output must have the shape of the oracle, got {output.shape} and {oracle.shape}")
    if not np.isfinite(output).all():
        raise ValueError("output must be finite, got NaN or infinity")
    return np.abs(output.astype(np.float64) - oracle).max(axis=(-2, -1))


def attention_error_bound(
    baseline: Float[np.ndarray, "*lead queries dim"],
    oracle: Float64[np.ndarray, "*lead queries dim"],
    *,
    eps: float,
) -> Float64[np.ndarray, "*lead"]:
    """Largest error that an implementation may have, per leading index: `2 * (error(baseline) + eps * max|oracle|)`.

    Parameters
    ----------
    baseline : (..., queries, dim): the plain formula, computed in the dtype under test.
    oracle : (..., queries, dim), float64.
    eps : spacing of the dtype under test at 1, for example `np.finfo(np.float32).eps`.

    Examples
    --------
    >>> attention_error_bound(np.array([[1.0, 2.25]]), np.array([[1.0, 2.0]]), eps=0.125)
    np.float64(1.0)
    """
    return 2 * (attention_error(baseline, oracle) + eps * np.abs(oracle).max(axis=(-2, -1)))
