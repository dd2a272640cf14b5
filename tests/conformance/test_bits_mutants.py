"""The conformance suite on entries in few bits: wrong fast codes and caches are caught, their cause is named."""

import pytest
import torch
from patches import Mutant, Patch, made_with, put, together

from kvcluster import fast
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.operations import OPERATIONS

CACHES = ("ClusteredCache", "RaggedCache")
CODES, ALL = ("quantize",), ("quantize", *CACHES)
CLASSES = "cache.ClusteredCache", "ragged_cache.RaggedCache"
PADDED, CODED, PACK, UNPACK = (
    tuple(f"{module}.{name}" for module in modules)
    for name, modules in (
        ("padded_to_groups", ("quantization", "exact/blocks")),
        ("codes_of", ("quantization", "exact/blocks")),
        ("pack", ("exact/blocks",)),
        ("unpack", ("exact/blocks", "memory/packed")),
    )
)
IN_TORCH = put(lambda *_: "torch", "backends.choose")  # C++ packs by itself


def instead_of(name: str, function) -> Patch:
    """A method of tensors that nothing but the arithmetic of codes calls."""
    return lambda monkeypatch: monkeypatch.setattr(torch.Tensor, name, function)


def with_bits(change) -> Patch:
    """Both caches made with other bits, a function of the given ones."""
    return together(*(made_with(place, bits=lambda given: change(given.get("bits", 16))) for place in CLASSES))


def filled_with_zeros(right, array):
    missing = -array.shape[-1] % 32
    return right(torch.nn.functional.pad(array, (0, missing)))


def neighbours(right, codes, bits):
    """Codes of 3 bits as they are."""
    if bits == 3:
        return right(codes, bits)
    order = torch.arange(32).view(-1, 8 // bits).T.flatten()
    return right(codes[..., order], bits)


def neighbours_back(right, packed):
    bits = packed.shape[-1] // 4
    if bits == 3:
        return right(packed)
    return right(packed)[..., torch.arange(32).view(8 // bits, -1).T.flatten()]


def blocks_turned(part: int) -> Patch:
    """Keys, part 0, or values of 32 features lie in their blocks of 32 entries the other way round."""

    def turned(array):
        return array.unflatten(-2, (-1, 32)).mT.flatten(-3, -2) if array.shape[-1] == 32 else array

    def pack(right, *arrays):
        return right(*(turned(array) if place == part else array for place, array in enumerate(arrays)))

    def unpack(right, blocks, layout):
        return tuple(turned(array) if place == part else array for place, array in enumerate(right(blocks, layout)))

    return together(IN_TORCH, put(pack, *PACK), put(unpack, *UNPACK))


def with_sinks(right, held, start, n, n_behind=0):
    right(held, 0, n + start, n_behind)


def in_64(right, held, n_chunks):
    return tuple(0 if held.bits is None else n_chunks * target // 64 * 64 for target in held._targets)


def counts_in_bytes(right, held, head, keys, values, counts, n_behind=0):
    right(held, head, keys, values, counts % 256, n_behind)


def one_fewer(right, held, *args, **given):
    n_exact = given.get("n_exact")
    right(held, *args, **given | {"n_exact": n_exact - 1 if n_exact else n_exact})


def put_limit(monkeypatch):
    """A zero of any size, of which 16 bits are kept."""
    monkeypatch.setattr("kvcluster.fast.exact.quantization.LARGEST_ZERO", 2.0**400)


CAUSES = {
    "halves up": "halves are rounded up",
    "scales to nearest": "scales are rounded to the nearest bfloat16",
    "zeros fill the last group": "the last group is filled with zeros",
    "codes where no number is": "places without a number have codes",
    "zero of whole steps": "the zero is a whole number of steps",
    "no limit of the zero": "scales have no limit below",
    "neighbours share a byte": "codes that share a byte are neighbours",
    "bits ignored": "bits is ignored",
    "bits swapped": "the bits of keys and of values are swapped",
    "bits of the keys": "values have the bits of the keys",
    "keys entry by entry": "keys share scales entry by entry",
    "values channel by channel": "values share scales channel by channel",
    "64 at a time": "entries are quantized 64 at a time",
    "sinks are quantized": "sinks are quantized too",
    "counts in bytes": "counts of quantized entries have 8 bits",
    "what leaves at once is exact": "tokens that leave at once are clustered exact",
    "one fewer is exact": "n_exact is one token fewer",
}
OF_EXACT = "what leaves at once is exact", "one fewer is exact"
MUTANTS = (
    Mutant(
        "halves up",
        ALL,
        together(
            IN_TORCH,
            instead_of("round", lambda x: (x + 0.5).floor()),
            instead_of("round_", lambda x: x.add_(0.5).floor_()),
        ),
    ),
    Mutant(
        "scales to nearest",
        ALL,
        together(IN_TORCH, put(lambda right, x: x.bfloat16(), "exact/quantization.up_to_bfloat16")),
    ),
    Mutant(
        "zeros fill the last group",
        ALL,
        together(
            IN_TORCH,
            put(filled_with_zeros, *PADDED),
            put(lambda right, groups, bits, n: right(groups, bits, 32), *CODED),
        ),
    ),
    Mutant("codes where no number is", CODES, put(lambda right, groups, bits, n: right(groups, bits, 32), *CODED)),
    Mutant(
        "zero of whole steps",
        ALL,
        together(IN_TORCH, instead_of("round", lambda x: torch.round(x / 16) * 16)),
    ),
    Mutant("no limit of the zero", ALL, together(IN_TORCH, put_limit)),
    Mutant(
        "neighbours share a byte",
        CODES,
        together(
            IN_TORCH, put(neighbours, "exact/quantization.pack"), put(neighbours_back, "exact/quantization.unpack")
        ),
    ),
    Mutant("bits ignored", CACHES, with_bits(lambda bits: 16)),
    Mutant("bits swapped", CACHES, with_bits(lambda bits: bits[::-1] if isinstance(bits, tuple) else bits)),
    Mutant("bits of the keys", CACHES, with_bits(lambda bits: bits[0] if isinstance(bits, tuple) else bits)),
    Mutant("keys entry by entry", CACHES, blocks_turned(0)),
    Mutant("values channel by channel", CACHES, blocks_turned(1)),
    Mutant(
        "64 at a time",
        CACHES,
        together(
            put(
                lambda right, held, start, n, _=0: right(held, start, n // 64 * 64),
                "quantized_body.CacheWithBits._quantize",
            ),
            put(in_64, "ragged_cache.RaggedCache._quantized"),
        ),
    ),
    Mutant("sinks are quantized", CACHES[:1], put(with_sinks, "quantized_body.CacheWithBits._quantize")),
    Mutant("counts in bytes", CACHES, put(counts_in_bytes, "memory/packed.PackedBlocks.add")),
    Mutant(
        "what leaves at once is exact",
        CACHES,
        put(lambda right, held, keys, values: (keys, values), "memory/packed.PackedBlocks.read_back"),
    ),
    Mutant("one fewer is exact", CACHES, put(one_fewer, *(f"{place}.__init__" for place in CLASSES))),
)


def put_cases(monkeypatch, *without):
    """Of the caches' cases only those with bits, since the others have nothing to do with it."""

    def of_bits(operation, seed):
        cases = [case for case in cases_of(operation, seed) if "bits" in case.parameters]
        return [case for case in cases if not set(without) & set(case.parameters)]

    monkeypatch.setattr("kvcluster.conformance.cases.cases_of", of_bits)


@pytest.mark.slow
def test_the_fast_path_is_right(monkeypatch):
    put_cases(monkeypatch)
    assert check(Implementation(fast), only=ALL, has_smallest=False).agrees


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_and_its_cause_named(mutant, monkeypatch):
    put_cases(monkeypatch, *(() if mutant.name in OF_EXACT else ("n_exact",)))
    mutant.patch(monkeypatch)
    report = check(Implementation(fast), only=ALL, has_smallest=False)
    found = {each.operation: each.counterexample for each in report.operations if each.counterexample is not None}
    assert set(found) == set(mutant.operations)
    for each in found.values():
        assert each.cause is not None
        assert CAUSES[mutant.name] in each.cause
        assert each.rule.startswith("19.")


def test_every_mutant_has_a_cause_that_is_known():
    assert [mutant.name for mutant in MUTANTS] == list(CAUSES)
    for mutant in MUTANTS:
        for operation in mutant.operations:
            known = [mistake.cause for mistake in OPERATIONS[operation].mistakes]
            assert sum(CAUSES[mutant.name] in cause for cause in known) == 1, (mutant.name, operation)
