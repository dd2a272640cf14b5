"""A stand-in for matrix products in float32, as wrong as the proofs of the filters allow, on every processor alike.

Whether a real product misleads those who believe it depends on the processor. This one always does.
"""

import pytest
import torch


def prefer_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product is exact, rounded once, but in the last row and the last column too large.

    By half of the bound that E4 and E9 of theory/exactness.md start from, `n * u * sum |a_i b_i|` for sums of n terms.
    Sums of whole numbers stay exact, as they are in every order.
    """
    right = torch.Tensor.__matmul__

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != torch.float32 or all(torch.equal(x, x.round()) for x in (a, b)):
            return right(a, b)
        result, sizes = right(a.double(), b.double()), right(a.double().abs(), b.double().abs())
        is_last = torch.zeros_like(result, dtype=torch.bool)
        is_last[..., -1, :] = is_last[..., -1] = True
        return (result + a.shape[-1] / 2 * 2.0**-24 * sizes * is_last).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
