"""Other ways to store entries in few bits: what is read back, and how many bits a number takes."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvcluster.evaluation.quality.methods import DISTINCTIVE, Method, alike
from kvcluster.fast import ClusteredCache as LayerCache
from kvcluster.fast import Distinctive

__all__ = ["LAYOUTS", "OF_OTHERS", "of_channels"]

Layout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # keys and values (..., entries, dim), as they are read back


def in_groups(array: Float[Tensor, "*lead numbers"], bits: int, size: int) -> Tensor:
    """Groups of `size` numbers along the last axis, with the least of them and a step, both in float16."""
    n_missing = -array.shape[-1] % size
    padded = torch.cat([array, array[..., -1:].expand(*array.shape[:-1], n_missing)], dim=-1)
    groups = padded.unflatten(-1, (-1, size)).float()
    low = groups.amin(dim=-1, keepdim=True).half().float()
    step = ((groups.amax(dim=-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp(min=1e-6)
    read = low + step * ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return read.flatten(-2)[..., : array.shape[-1]].to(array.dtype)


def of_channels(keys: Tensor, values: Tensor, *, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Keys by channel, values by entry, as KIVI has it (arXiv:2402.02750)."""
    return in_groups(keys.mT, bits, size).mT, in_groups(values, bits, size)


def of_entries(keys: Tensor, values: Tensor, *, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values by entry."""
    return in_groups(keys, bits, size), in_groups(values, bits, size)


@functools.cache
def levels(bits: int) -> Tensor:
    """The numbers that stand best for a normal distribution (Lloyd-Max)."""
    sample = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    codes = sample[:: len(sample) // 2**bits][: 2**bits].clone()
    for _ in range(200):
        nearest = torch.bucketize(sample, (codes[1:] + codes[:-1]) / 2)
        codes = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, nearest, sample) / nearest.bincount()
    return codes.float()


def rotated(keys: Tensor, values: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """The idea of TurboQuant (arXiv:2504.19874): rotated at random, so that all features are alike, in best levels.

    The mean key of each head, which rotation would spread over all features, is taken away before.
    """
    mean = keys.mean(dim=-2, keepdim=True)
    return in_levels(keys - mean, bits) + mean, in_levels(values, bits)


def in_levels(array: Float[Tensor, "*lead dim"], bits: int) -> Tensor:
    dim = array.shape[-1]
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]
    of, middle = levels(bits), (levels(bits)[1:] + levels(bits)[:-1]) / 2
    size = (array.norm(dim=-1, keepdim=True) / math.sqrt(dim)).half().float().clamp(min=1e-6)
    turned = array @ rotation
    return of[torch.bucketize(turned / size, middle)] * size @ rotation.mT


def by_quanto(keys: Tensor, values: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """What transformers' `QuantizedCache` makes of a prompt with optimum-quanto, in its default groups."""
    from transformers.cache_utils import QuantoQuantizedLayer

    layer: Any = QuantoQuantizedLayer(nbits=bits)
    back = (layer._dequantize(layer._quantize(x.contiguous(), layer.axis_key)) for x in (keys, values))
    read_keys, read_values = back
    return read_keys, read_values


def by_hqq(keys: Tensor, values: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """What transformers' `QuantizedCache` makes of a prompt with hqq, in groups of 64 along the axis it recommends."""
    from transformers.cache_utils import HQQQuantizedLayer

    layer: Any = HQQQuantizedLayer(nbits=bits, axis_key=1, axis_value=1)
    layer.keys, layer.values = keys, values  # it takes their device
    read_keys, read_values = (layer._dequantize(layer._quantize(x.contiguous(), 1)) for x in (keys, values))
    return read_keys.to(keys.dtype), read_values.to(values.dtype)


def by_turboquant(keys: Tensor, values: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """What the package turboquant (0.2.0) makes of old tokens: the idea of `rotated`, by others, without the mean."""
    from turboquant.cache import _get_quantizer

    vars(np).setdefault("trapz", np.trapezoid)  # which the package still calls by its old name

    def read_back(array: Tensor) -> Tensor:
        quantizer = _get_quantizer(array.shape[-1], bits, "cpu")
        return quantizer.dequantize(*quantizer.quantize(array.flatten(0, -2))).view_as(array).to(array.dtype)

    return read_back(keys), read_back(values)


class WithLayout(LayerCache):
    """A cache whose body is read back by a layout; each number of it counts as so many bits."""

    def __init__(self, layout: Layout, bits_of_number: Callable[[int], float], **rules: Any) -> None:
        super().__init__(**rules)
        self.layout, self.bits_of_number = layout, bits_of_number

    def _cluster(self) -> None:
        if not self.is_due:
            return
        super()._cluster()
        body = slice(self.n_sink, self.n_sink + self.n_body)
        keys, values, _ = self._held
        keys[..., body, :], values[..., body, :] = self.layout(keys[..., body, :], values[..., body, :])

    @property
    def n_numbers(self) -> int:
        return super().n_numbers - self.n_in_body

    @property
    def n_in_body(self) -> int:
        """Numbers of keys and values in the body."""
        assert self._held is not None
        return sum(x[..., : self.n_body, :].numel() for x in self._held[:2])

    @property
    def nbytes(self) -> int:
        of_number = self.bits_of_number(self._held[0].shape[-1]) / 8
        return super().nbytes - int(self.n_in_body * (self._held[0].itemsize - of_number))


def with_layout(layout: Layout, bits_of_number: Callable[[int], float]) -> Callable[[Any, float, int], Any]:
    """All heads alike, or with 1 all tokens, and the body in a layout."""

    def make(model: Any, keep: float, n_tokens: int) -> Any:
        cache = alike(Distinctive(n_shared=4))(model, keep, n_tokens)
        for layer in cache.own_layers:
            rules = {"keep_ratio": cache.parameters["keep_ratio"], "method": Distinctive(n_shared=4), **DISTINCTIVE}
            layer.make = partial(WithLayout, layout, bits_of_number, **rules)
            layer.reset()
        return cache

    return make


def method(layout: Callable[..., tuple[Tensor, Tensor]], bits_of_number: Callable[[int], float], **how: int) -> Method:
    return Method(with_layout(partial(layout, **how), bits_of_number), layout.__name__, is_blind=True)


LAYOUTS = {
    **{
        f"channels{size}-{bits}": method(of_channels, lambda dim, b=bits, s=size: b + 32 / s, bits=bits, size=size)
        for bits, size in ((4, 32), (4, 64), (3, 32), (2, 32))
    },
    **{f"entries-{bits}": method(of_entries, lambda dim, b=bits: b + 1, bits=bits, size=32) for bits in (4, 2)},
    **{f"rotated-{bits}": method(rotated, lambda dim, b=bits: b + 16 / dim, bits=bits) for bits in (4, 3, 2)},
}
# Needs a package that is not among this project's.
OF_OTHERS = {
    "optimum": {f"quanto-{bits}": method(by_quanto, lambda dim, b=bits: b + 0.5, bits=bits) for bits in (4, 2)},
    "hqq": {f"hqq-{bits}": method(by_hqq, lambda dim, b=bits: b + 0.5, bits=bits) for bits in (8, 4, 2)},
    "turboquant": {
        f"turboquant-{bits}": method(by_turboquant, lambda dim, b=bits: b + 32 / dim, bits=bits) for bits in (4, 3)
    },
}
