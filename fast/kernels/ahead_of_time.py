"""Compile every kernel for GPUs that are not there, and read the compiler's report on registers and instructions."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..exact.blocks import BlockLayout
from ..exact.quantization import GROUP as BLOCK
from .assign import BLOCK_ROWS as assign_rows
from .assign import BLOCK_SCORED as assign_scored
from .assign import N_STAGES as assign_stages
from .assign import columns_of, filter_kernel, settle_kernel, warps_of
from .attended_matching import BLOCK_TOKENS as DOTS_TOKENS
from .attended_matching import N_WARPS as dots_warps
from .attended_matching import dots_kernel
from .attention import N_STAGES, ROWS, SPLIT, entries_of_step, split_kernel
from .attention import N_WARPS as attention_warps
from .combine import combine_kernel
from .likeness import BLOCK_TOKENS, likeness_kernel
from .likeness import N_WARPS as likeness_warps
from .match import BLOCK_COLUMNS, BLOCK_ROWS, BLOCK_SCORED, match_kernel
from .match import N_STAGES as match_stages
from .match import N_WARPS as match_warps
from .merge import BLOCK_ENTRIES, merge_kernel
from .merge import N_WARPS as merge_warps
from .packed import FEATURES, SPLIT_BLOCKS, constants_of, packed_kernel, rows_of_program
from .packed import N_STAGES as packed_stages
from .packed import N_WARPS as packed_warps
from .score import BLOCK_SOURCES, score_kernel
from .score import N_WARPS as score_warps
from .select import BLOCK_CLUSTERS, cluster_scores_kernel
from .select import N_WARPS as select_warps

__all__ = ["KERNELS", "TARGETS", "TYPES", "Compiled", "compile_all"]

# Published memory bandwidth in bytes per second: A100 80 GB SXM, H100 SXM, B200, MI300X.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 2.039e12),
    "sm_90": (GPUTarget("cuda", 90, 32), 3.35e12),
    "sm_100": (GPUTarget("cuda", 100, 32), 8.0e12),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 5.3e12),
}
KERNELS = (
    *("match", "score", "likeness", "dots", "merge", "merge_weighted"),
    *("attend", "attend_ragged", "attend_packed", "combine", "assign", "settle", "select", "recall"),
)
TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# The problem whose bytes are counted.
# Strides that are multiples of 16 in a contiguous cache.
STRIDES = {"stride_batch", "stride_head", "stride_chunk", "stride_problem", "stride_token", "block_batch"} | {
    f"{array}_{axis}" for array in ("key", "value") for axis in ("batch", "head", "entry")
}
HEADS, TOKENS, CHUNK_SIZE, GROUP = 8, 32_768, 64, 4
TOKENS_PER_CLUSTER, RECALLED = 8, 1024  # of a recall cache
BITS = 4, 4  # of keys and of values
QUERIES = 7  # that look at a chunk, of each query head


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one dtype and target.

    Attributes
    ----------
    registers, spills, shared : registers of a thread; bytes that did not fit them; bytes of shared memory of a block.
    tensor_core_products, wide_loads : such instructions in the code (16-byte loads).
    bytes_moved : what the kernel must read and write for one round on 8 heads x 32,768 tokens in chunks of 64; in
        attention, for one new token and 4 query heads that share a KV head; in blocks, codes of 4 bits; in recall, 8
        tokens a cluster and 1,024 recalled tokens.
    predicted_seconds : `bytes_moved` over the published bandwidth of the target. A prediction, not a measurement.
    """

    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    tensor_core_products: int
    wide_loads: int
    bytes_moved: int
    predicted_seconds: float


def compile_all(targets: tuple[str, ...] = tuple(TARGETS), dim: int = 128) -> Iterator[Compiled]:
    """Every kernel in every dtype for every target at `dim`, from 16 to 256; takes a second or two each.

    Raises
    ------
    RuntimeError : Triton's interpreter is switched on, which replaces the compiler.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET unset, got 1")
    for target in targets:
        for dtype in TYPES:
            asked = dtype, TARGETS[target][0].backend, dim
            for kernel, code, options in (*sources(*asked), *recall_sources(*asked)):
                yield compile_one(kernel, code, options, dtype, target, dim)


def sources(dtype: str, backend: str, dim: int) -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    """Name, code and options of each kernel, as a contiguous tensor calls it; likeness at chunk size 64."""
    strides = dict.fromkeys(("stride_batch", "stride_head", "stride_token"), "i32")
    chunk = {"keys": TYPES[dtype], "heads": "i32", "chunks": "i32", "size": "i32"} | strides
    block_dim = triton.next_power_of_2(dim)
    shape = {"stride_dim": 1, "DIM": dim, "BLOCK_DIM": block_dim}
    in_chunk = shape | {"STEPS": block_dim.bit_length() - 1}
    types = chunk | {"destination_out": "*i64", "is_scored_out": "*i1", "lead": "fp32"}
    blocks = {"ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_COLUMNS, "SCORED": BLOCK_SCORED, "WIDEN": False}
    options = {"num_warps": match_warps[backend], "num_stages": match_stages}
    yield "match", source(match_kernel, types, in_chunk | blocks), options
    types = chunk | {"destination_in": "*i64", "similarity_out": "*fp64"}
    yield "score", source(score_kernel, types, in_chunk | {"ROWS": BLOCK_SOURCES}), {"num_warps": score_warps}
    types = chunk | {"array": TYPES[dtype], "means": "*fp32", "similarity_out": "*fp64"}
    blocks = {"SIZE": CHUNK_SIZE, "ROWS": BLOCK_TOKENS}
    yield "likeness", source(likeness_kernel, types, in_chunk | blocks), {"num_warps": likeness_warps}
    types = {"keys": TYPES[dtype], "queries": TYPES[dtype], "dots_out": "*fp64", "n_queries": "i32"}
    types |= dict.fromkeys(("stride_chunk", "stride_token"), "i32")
    blocks = {"SIZE": CHUNK_SIZE, "ROWS": DOTS_TOKENS}
    yield "dots", source(dots_kernel, types, in_chunk | blocks), {"num_warps": dots_warps}
    types = {"array": TYPES[dtype], "members": "*i64", "first_member": "*i64", "counts": "*i64", "means": "*fp32"}
    types |= dict.fromkeys(("n_entries", "heads", "tokens"), "i32") | strides
    for kernel, has_weights in (("merge", False), ("merge_weighted", True)):
        types["weights"] = "*i32" if has_weights else TYPES[dtype]
        constants = shape | {"ENTRIES": BLOCK_ENTRIES, "HAS_WEIGHTS": has_weights}
        yield kernel, source(merge_kernel, types, constants), {"num_warps": merge_warps}
    yield "attend", *attention_source(dtype, dim)
    yield "attend_ragged", *attention_source(dtype, dim, is_ragged=True)
    yield "attend_packed", *packed_source(dtype, backend, BlockLayout(dim, dim, BITS), GROUP)
    types = dict.fromkeys(("outputs", "sums", "highest_in", "output_out"), "*fp32") | {"splits": "i32"}
    yield (
        "combine",
        source(combine_kernel, types, {"DIM_VALUE": dim, "BLOCK_VALUE": block_dim}),
        {"num_warps": attention_warps},
    )


def recall_sources(dtype: str, backend: str, dim: int) -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    """The same of the kernels that only recall needs; clusters are scored by bfloat16 features unless in float32."""
    block_dim = triton.next_power_of_2(dim)
    shape = {"DIM": dim, "BLOCK_DIM": block_dim}
    canonical = shape | {"STEPS": block_dim.bit_length() - 1}
    types = {"keys": TYPES[dtype], "centroids": "*fp32", "labels_out": "*i64", "threshold_in": "*fp32"}
    types |= {"threshold_out": "*fp32", "lead": "fp32"}
    types |= dict.fromkeys(("blocks", "tokens", "clusters", "stride_problem", "stride_token"), "i32")
    blocks = {"ROWS": assign_rows, "COLUMNS": columns_of(getattr(torch, dtype))}
    blocks |= {"WIDEN": dtype == "float32", "stride_dim": 1}
    options = {"num_warps": warps_of(getattr(torch, dtype), block_dim), "num_stages": assign_stages}
    yield "assign", source(filter_kernel, types, shape | blocks), options
    yield "settle", source(settle_kernel, types, canonical | {"SCORED": assign_scored, "stride_dim": 1}), options
    features = TYPES["float32" if dtype == "float32" else "bfloat16"]
    types = {"probe": "*fp32", "features": features, "mean": "*fp32", "scores_out": "*fp64"}
    types |= dict.fromkeys(("blocks", "clusters", "group"), "i32")
    constants = canonical | {"CLUSTERS": BLOCK_CLUSTERS}
    yield "select", source(cluster_scores_kernel, types, constants), {"num_warps": select_warps}
    yield "recall", *attention_source(dtype, dim, has_places=True)


def attention_source(
    dtype: str, dim: int, *, has_places: bool = False, is_ragged: bool = False
) -> tuple[ASTSource, dict[str, int]]:
    """Code and options of attention to all entries with their counts, or to those that an index names."""
    types = dict.fromkeys(("query", "keys", "values"), TYPES[dtype]) | {"scale": "fp32"}
    types |= {"counts": TYPES[dtype] if has_places else "*i32", "places": "*i64" if has_places else TYPES[dtype]}
    types["ragged"] = "*i64" if is_ragged else TYPES[dtype]
    types |= dict.fromkeys(("outputs", "sums", "highest_out"), "*fp32")
    types |= dict.fromkeys(("heads", "rows", "queries", "entries", "place_problem"), "i32")
    types |= {f"{array}_{axis}": "i32" for array in ("key", "value", "count") for axis in ("batch", "head", "entry")}
    constants = {"key_dim": 1, "value_dim": 1, "count_entry": 1, "place_entry": 1}
    constants |= {"DIM": dim, "DIM_VALUE": dim, "ROWS": ROWS, "SPLIT": SPLIT}
    constants |= dict.fromkeys(("BLOCK_DIM", "BLOCK_VALUE"), triton.next_power_of_2(dim))
    constants |= {"HAS_COUNTS": not has_places, "HAS_PLACES": has_places, "IS_RAGGED": is_ragged}
    constants["IS_CHECKED"] = False
    constants["WIDEN"] = False
    constants["ENTRIES"] = entries_of_step(dtype == "float32")
    return source(split_kernel, types, constants), {"num_warps": attention_warps, "num_stages": N_STAGES}


def packed_source(dtype: str, backend: str, layout: BlockLayout, rows: int) -> tuple[ASTSource, dict[str, int]]:
    """Code and options of attention of so many query rows to blocks."""
    types = {"query": TYPES[dtype], "blocks": "*u8", "shorts": "*i16", "ragged": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("outputs", "sums", "highest_out"), "*fp32")
    types |= dict.fromkeys(("heads", "rows", "block_batch"), "i32")
    of_program = rows_of_program(rows, backend)
    constants = {"ROWS": of_program, "FEATURES": FEATURES[of_program], "SPLIT": SPLIT_BLOCKS}
    options = {"num_warps": packed_warps, "num_stages": packed_stages}
    return source(packed_kernel, types, constants_of(layout) | constants), options


def source(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """What the launcher's just-in-time compiler would see: pointers and strides are multiples of 16."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in STRIDES]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[kernel.arg_names[i]] != "constexpr"}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_one(kernel: str, code: ASTSource, options: dict[str, int], dtype: str, target: str, dim: int) -> Compiled:
    gpu, bandwidth = TARGETS[target]
    compiled = triton.compile(code, target=gpu, options=options)
    resources = cuda_resources if gpu.backend == "cuda" else amd_resources
    registers, spills, products, wide_loads = resources(compiled.asm)
    n_bytes = bytes_moved(kernel, dtype, dim)
    return Compiled(
        kernel=kernel,
        dtype=dtype,
        target=target,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_core_products=products,
        wide_loads=wide_loads,
        bytes_moved=n_bytes,
        predicted_seconds=n_bytes / bandwidth,
    )


def bytes_moved(kernel: str, dtype: str, dim: int) -> int:
    """All keys once; then for match 9 bytes a source, for score 16; for merge 8 a token (12 with its weight), 16 an
    entry, and centroids; for likeness 8 a token, and the mean of each chunk; for dots 8 a token and query.

    In attention all keys, values and counts, or the blocks that hold them, and the partial results, which are what is
    combined. To assign, all keys, the centroids of every segment, and 9 bytes a token; to select, all features and 8
    bytes a cluster; to recall, the recalled keys and values, 8 bytes for each, and the partial results.
    """
    if kernel in ("assign", "settle", "select", "recall"):
        return recall_bytes_moved(kernel, dtype, dim)
    if kernel == "attend_packed":
        blocks = HEADS * TOKENS // BLOCK
        return blocks * BlockLayout(dim, dim, BITS).nbytes + GROUP * blocks // SPLIT_BLOCKS * (dim + 2) * 4
    if kernel in ("attend", "attend_ragged", "combine"):
        partial = HEADS * GROUP * TOKENS // SPLIT * (dim + 2) * 4
        return partial + (HEADS * TOKENS * (2 * dim * ITEM_BYTES[dtype] + 4) if kernel != "combine" else 0)
    keys = HEADS * TOKENS * dim * ITEM_BYTES[dtype]
    if kernel == "likeness":
        return keys + HEADS * TOKENS * 8 + HEADS * TOKENS // CHUNK_SIZE * dim * 4
    if kernel == "dots":
        return keys + HEADS * TOKENS * GROUP * QUERIES * 8
    entries = HEADS * TOKENS // 2  # after the first round; as many sources
    if kernel in ("match", "score"):
        return keys + entries * (9 if kernel == "match" else 16)
    return keys + HEADS * TOKENS * (8 if kernel == "merge" else 12) + entries * (16 + dim * 4)


def recall_bytes_moved(kernel: str, dtype: str, dim: int) -> int:
    clusters = HEADS * TOKENS // TOKENS_PER_CLUSTER
    if kernel in ("assign", "settle"):
        return HEADS * TOKENS * (dim * ITEM_BYTES[dtype] + 9) + clusters * dim * 4
    if kernel == "select":
        return clusters * (2 * dim * (4 if dtype == "float32" else 2) + 8)
    partial = HEADS * GROUP * RECALLED // SPLIT * (dim + 2) * 4
    return partial + HEADS * RECALLED * (2 * dim * ITEM_BYTES[dtype] + 8)


def cuda_resources(code: dict[str, Any]) -> tuple[int, int, int, int]:
    """Registers, spilled bytes, tensor-core products and 16-byte loads, from the assembler's own report."""
    ptx = code["ptx"]
    architecture = found(r"\.target\s+(\w+)", ptx)
    tool = triton.knobs.nvidia.ptxas_blackwell if architecture.startswith("sm_1") else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={architecture}", file, "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(found(r"Used (\d+) registers", report))
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", report))
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx))
    wide_loads = re.findall(r"ld\.global[.\w]*\.v4\.b32|cp\.async\.cg", ptx)  # to registers, to shared memory
    return registers, spills, products, len(wide_loads)


def amd_resources(code: dict[str, Any]) -> tuple[int, int, int, int]:
    """The same from AMD's assembly."""
    text = code["amdgcn"]
    registers = int(found(r"\.vgpr_count:\s+(\d+)", text))
    spills = int(found(r"\.vgpr_spill_count:\s+(\d+)", text))
    return registers, spills, text.count("v_mfma"), len(re.findall(r"(?:global|buffer)_load_dwordx4", text))


def found(pattern: str, text: str) -> str:
    """The group of `pattern` where it first occurs in `text`."""
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in the compiler's report"
    return match.group(1)
