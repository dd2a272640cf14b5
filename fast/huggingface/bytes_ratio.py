"""What a share of the memory buys: in how many bits entries are stored, and how many entries.

More entries in few bits beat fewer exact ones ("More Tokens, Lower Precision", arXiv:2412.12706). How far each number
of bits should go is our choice, from what two models keep at equal bytes: see docs/bits.md.
"""

from typing import Any

from ..exact.quantization import GROUP, PLANES
from ..scalars import check_number
from .hooks import head_dim
from .profiles import Profile

__all__ = ["BITS", "N_EXACT", "chosen_for_bytes", "share_of_bytes"]

BITS = tuple(PLANES)  # from the most
N_EXACT = 32  # last tokens, which are exact
COUNT_BITS = 16  # of an entry
# Bits, and the smallest part of the tokens that they are used for where no profile says more; below it fewer bits keep
# more tokens instead.
LEAST_KEPT = {8: 1.0, 4: 0.14, 3: 0.0}


def share_of_bytes(bits: int, dim: int, itemsize: int) -> float:
    """Bytes of an entry in `bits`, with its part of scales and zeros and with its count, over those of a token.

    >>> share_of_bytes(4, dim=64, itemsize=2)
    0.3203125
    """
    of_number = bits + 32 / GROUP  # a scale and a zero, of 16 bits each, for 32 numbers
    return (2 * dim * of_number + COUNT_BITS) / (2 * dim * 8 * itemsize)


def chosen_for_bytes(
    bytes_ratio: float, config: Any, itemsize: int, profile: Profile | None = None
) -> tuple[float, int]:
    """`keep_ratio` and `bits` for clustered entries that take `bytes_ratio` of what all their tokens would take.

    Fewest bits are those that `profile` has found at so many bytes, or that two models favour; more are taken if all
    tokens fit.

    Raises
    ------
    TypeError, ValueError : not a number in (0, 1).
    """
    ratio = check_number("bytes_ratio", bytes_ratio)
    if not 0 < ratio < 1:
        raise ValueError(f"bytes_ratio must be in (0, 1), got {bytes_ratio}")
    dim = head_dim(config)
    found = None if profile is None else profile.bits_at(ratio * itemsize / 2)
    least_kept = LEAST_KEPT if found is None else {bits: 0.0 if bits == found else 1.0 for bits in BITS}
    for bits, least in least_kept.items():
        kept = ratio / share_of_bytes(bits, dim, itemsize)
        if kept >= least:
            return min(1.0, kept), bits
    raise AssertionError("the last number of bits takes everything")
