"""`kvcluster kernels`: what the compiler makes of the Triton kernels, for GPUs that need not be there."""

import os

from .refusing import fail

__all__ = ["kernels"]


def kernels() -> None:
    """Compile every Triton kernel ahead of time and print registers, spills, shared memory and predicted times."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    os.environ.pop("TRITON_INTERPRET", None)
    try:
        from kvcluster.fast.kernels.ahead_of_time import KERNELS, TARGETS, TYPES, compile_all
    except ModuleNotFoundError as error:
        fail("kernels", f"{error.name} is not installed: pip install 'kvcluster[fast]'")

    console = Console()
    table = Table(title="Triton kernels, compiled ahead of time; none has run on a GPU here")
    for column in ("kernel", "dtype", "target"):
        table.add_column(column)
    numbers = ("registers", "spilled bytes", "shared bytes", "tensor-core products", "16-byte loads", "MB moved")
    for column in (*numbers, "predicted µs"):
        table.add_column(column, justify="right")
    for kernel in track(compile_all(), description="Compile", total=len(KERNELS) * len(TYPES) * len(TARGETS)):
        table.add_row(
            kernel.kernel,
            kernel.dtype,
            kernel.target,
            str(kernel.registers),
            str(kernel.spills),
            f"{kernel.shared:,}",
            str(kernel.tensor_core_products),
            str(kernel.wide_loads),
            f"{kernel.bytes_moved / 1e6:.0f}",
            f"{1e6 * kernel.predicted_seconds:.0f}",
        )
    console.print(table)
    console.print(
        "Predicted: bytes that 8 heads x 32,768 tokens x 128 dims in chunks of 64 must move in one round (attend and "
        "combine: for one new token of 4 query heads a KV head; attend_packed: in 4 bits), over the published "
        "bandwidth of A100 80 GB, H100 SXM, B200 and MI300X. Not measured."
    )
