"""Safetensors files, written whole or not at all, that others may replace, cut or overwrite while they are read.

The library writes them, but does not read them here: it opens a file twice, so that a header of one file may meet
tensors of another, and maps it into memory, where reading what has been cut off ends the process.
"""

import json
import math
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...scratch import scratch_folder

__all__ = ["TensorFile", "write_tensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path, mode: int) -> None:
    """Put a file of the tensors, which are on the host, in the place of what `path` held.

    Raises
    ------
    OSError : it cannot be written; what `path` held is as it was.
    """
    try:
        with scratch_folder(path.parent) as folder:
            written = folder / "tensors"
            save_file(tensors, written, metadata)
            written.chmod(mode)
            with open(written, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(written, path)
    except SafetensorError as error:
        raise OSError(f"path must be writable, got {path}: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"path must be writable: {error.strerror}", str(path)) from error


class TensorFile:
    """The open `file` at `path`.

    Attributes
    ----------
    metadata : strings that are no tensors.
    tensors : dtype, shape, first byte and number of bytes of each tensor, by name.

    Raises
    ------
    ValueError : it is no whole safetensors file. Whether `metadata` holds strings is not looked at.
    """

    def __init__(self, file: BufferedReader, path: str | Path) -> None:
        self.file, self.path = file, path
        size = os.fstat(file.fileno()).st_size
        n_header = int.from_bytes(self._read(0, 8).numpy().tobytes(), "little")
        start = 8 + n_header
        if start > size:
            raise self._refused(f"a header of {n_header} bytes in a file of {size}")
        try:
            header = json.loads(self._read(8, n_header).numpy().tobytes())
            self.metadata = header.pop("__metadata__", {})
            self.tensors = {name: described(entry, start) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._refused(f"{error!r:.200}") from error
        end = start
        for _, _, first, nbytes in sorted(self.tensors.values(), key=lambda entry: entry[2:]):
            if first != end:
                raise self._refused(f"a tensor from byte {first} where {end} is next")
            end += nbytes
        if end != size:
            raise self._refused(f"tensors up to byte {end} of {size}")

    def get_tensor(self, name: str) -> Tensor:
        """The tensor in memory of its own, on the host.

        Raises
        ------
        ValueError : the file has become shorter.
        """
        dtype, shape, first, nbytes = self.tensors[name]
        return self._read(first, nbytes).view(dtype).reshape(shape)

    def _read(self, first: int, nbytes: int) -> Tensor:
        read = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self.file.seek(first)
        if self.file.readinto(read.numpy().data) < nbytes:
            raise self._refused(f"less than {first + nbytes} bytes")
        return read

    def _refused(self, what: str) -> ValueError:
        return ValueError(f"path must be a whole safetensors file, got {self.path}: {what}")


def described(entry: dict[str, Any], start: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """A tensor's entry of a header whose file has its numbers from byte `start` on."""
    dtype, shape, (first, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, stop)):
        raise ValueError(f"shape and data_offsets must be whole numbers from 0 on, got {shape} and {first}, {stop}")
    if math.prod(shape) * dtype.itemsize != stop - first:
        raise ValueError(f"{dtype} of shape {shape} must take the bytes from {first} to {stop}")
    return dtype, shape, start + first, stop - first
