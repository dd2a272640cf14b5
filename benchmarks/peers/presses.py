"""kvpress's presses that need no question, no training and no download, by name; `left-out.json` lists the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpress import (
    CapPress,
    ChunkKVPress,
    CompactorPress,
    CriticalKVPress,
    CURPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    LeverageScorePress,
    MergingPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)

__all__ = ["COMPARED", "IN_BITS", "PRESSES", "Press"]


@dataclass(frozen=True)
class Press:
    """How a press is made.

    Attributes
    ----------
    make : from kvpress's `compression_ratio`, the fraction that is *removed*; everything else is kvpress's default.
    needs_weights : whether it reads the weights of attention, which transformers gives in "eager" mode only.
    """

    make: Callable[[float], Any]
    needs_weights: bool = False


def plain(kind: Callable[..., Any]) -> Press:
    return Press(lambda ratio: kind(compression_ratio=ratio))


PRESSES = {
    "LagKV": plain(LagKVPress),
    "KeyDiff": plain(KeyDiffPress),
    "Knorm": plain(KnormPress),
    "ExpectedAttention": plain(ExpectedAttentionPress),
    "SnapKV": plain(SnapKVPress),
    "TOVA": plain(TOVAPress),
    "StreamingLLM": plain(StreamingLLMPress),
    "Merging(LagKV)": Press(lambda ratio: MergingPress(LagKVPress(ratio))),
    "Merging(KeyDiff)": Press(lambda ratio: MergingPress(KeyDiffPress(ratio))),
    "Random": plain(RandomPress),
    "Compactor": plain(CompactorPress),
    "LeverageScore": plain(LeverageScorePress),
    "CUR": plain(CURPress),
    "NonCausalAttn": plain(NonCausalAttnPress),
    "Cap": plain(CapPress),
    "CriticalKV(ExpectedAttention)": Press(
        lambda ratio: CriticalKVPress(ExpectedAttentionPress(ratio, use_vnorm=False))  # as kvpress asks
    ),
    "ChunkKV(SnapKV)": Press(lambda ratio: ChunkKVPress(SnapKVPress(ratio))),
    "EntropyGatedChunkKV(SnapKV)": Press(lambda ratio: EntropyGatedChunkKVPress(SnapKVPress(ratio))),
    "ObservedAttention": Press(lambda ratio: ObservedAttentionPress(compression_ratio=ratio), needs_weights=True),
}
IN_BITS = ("Compactor", "LagKV", "KeyDiff", "StreamingLLM", "ChunkKV(SnapKV)")  # the best in needles or perplexity
# Those that papers on compression after the question compare with.
COMPARED = ("SnapKV", "StreamingLLM", "LagKV", "KeyDiff", "Compactor", "ExpectedAttention", "TOVA")
