"""What a user of the oracle might bring: a port of two operations in NumPy, right and wrong."""

RIGHT_PORT = """
import numpy as np

def similarity(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)

    def halved(x):
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2 ** (x.shape[-1] - 1).bit_length() - x.shape[-1])])
        return x[..., 0] if x.shape[-1] == 1 else halved(x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :])

    dot = halved(a[..., :, None, :] * b[..., None, :, :])
    norms = halved(a * a)[..., :, None] * halved(b * b)[..., None, :]
    return np.where(norms == 0, 0.0, dot * abs(dot) / np.where(norms == 0, 1.0, norms))

def alternating_partition(size):
    return np.arange(0, size, 2), np.arange(1, size, 2)
"""
WRONG_PORT = RIGHT_PORT.replace(
    "np.arange(0, size, 2), np.arange(1, size, 2)", "np.arange(1, size, 2), np.arange(0, size, 2)"
)
