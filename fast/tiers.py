"""A recall cache in two tiers: all keys and values in slow memory, the clusters selected lately in fast memory."""

import copy
import mmap
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from .arguments import check_numbers_are_there, check_shape
from .backends import AnyBackend
from .exact.entries import Reached
from .memory.body_clusters import BodyClusters
from .memory.fast_tier import TierStatistics
from .memory.room import move_to_room, with_room
from .memory.segments import RecallSettings
from .recall_cache import RecallCache
from .scalars import check_integer

__all__ = ["TierStatistics", "TieredRecallCache"]


class BodyOfSlowTokens(BodyClusters):
    """Clusters on `device` of keys and values that lie on the host."""

    device = torch.device("cpu")

    def add(self, keys: Tensor, values: Tensor, n_clusters: int) -> Int64[Tensor, "problems tokens"]:
        return super().add(keys.to(self.device), values.to(self.device), n_clusters).to(keys.device)


class TieredRecallCache(RecallCache):
    """A `RecallCache` whose keys and values lie in slow memory, except those of the clusters recalled last.

    Clusters, recalled tokens and outputs are those of a `RecallCache`, bit for bit. Slow memory is a file for CPU
    tensors, mapped into the address space, and pinned host memory for CUDA tensors.

    Parameters
    ----------
    settings : the parameters of a `RecallCache`.
    folder : where the file lies; the system's folder for temporary files by default, which may be memory. CPU only.
    n_steps : the fast tier holds, whole, the clusters of which the last `n_steps` calls of `attend` took tokens; R in
        the paper (arXiv:2412.03213, DAC 2025), which uses 1.
    backend : as in `RecallCache`.

    Attributes
    ----------
    statistics : see `TierStatistics`.
    stored : views of the slow tier; `keys` and `values` are on the device of what was appended.
    nbytes_reserved : bytes of fast memory: clusters and fast tier. nbytes_slow : of the slow tier, room included.

    Raises
    ------
    ValueError : a folder that does not exist, or a folder for CUDA tensors; and all that `RecallCache` raises.
    OSError : the disk is full. After `extend` and `select` the cache is as it was, and usable; in the middle of
        `cluster` it is lost, and refuses everything.
    RuntimeError : in a process that was forked from the one that made it.

    Notes
    -----
    The file has no name from the moment it is mapped, so the system removes it however the process ends, and no run
    can read that of another. Its blocks are reserved before it is written to: a full disk is an error of
    `append`, not a signal later. Where its room (1 / 8) ends it moves to a larger one, and for that time both exist.

    On CUDA a step copies on a stream of its own, which waits for the attention that may still read what is overwritten,
    and for which the attention of this step waits. This part was written without a GPU and has never run.
    """

    body_class = BodyOfSlowTokens
    body: BodyOfSlowTokens

    def __init__(
        self,
        settings: RecallSettings,
        *,
        folder: str | Path | None = None,
        n_steps: int = 1,
        backend: AnyBackend = "auto",
    ) -> None:
        self._begin(settings, backend)
        n_steps = check_integer("n_steps", n_steps, least=1)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"folder must be an existing folder, got {str(folder)!r}")
        self.folder, self.n_steps, self.device = folder, n_steps, torch.device("cpu")
        self._process = os.getpid()

    @classmethod
    def as_published(
        cls,
        *,
        budget: int,
        seed: int = 0,
        folder: str | Path | None = None,
        n_steps: int = 1,
        backend: AnyBackend = "auto",
    ) -> "TieredRecallCache":
        """As `RecallCache.as_published`, in two tiers; the paper's R is 1."""
        settings = RecallSettings.as_published(budget=budget, seed=seed)
        return cls(settings, folder=folder, n_steps=n_steps, backend=backend)

    @property
    def nbytes_reserved(self) -> int:
        return self.body.nbytes + (0 if self._near is None else sum(array.nbytes for array in self._near.held))

    @property
    def nbytes_slow(self) -> int:
        of_body = 0 if self._packed is None else self._packed.nbytes_reserved
        return of_body + (0 if self._held is None else sum(array.nbytes for array in self._held))

    def check_new(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens that cannot be appended."""
        self._check_process()
        check_shape("keys", keys)
        check_shape("values", values)
        device = keys.device if self._held is None else self.device
        for name, new in (("keys", keys), ("values", values)):
            if new.device != device:
                raise ValueError(f"{name} must be on the device of the cache, {device}, got {new.device}")
            check_numbers_are_there(name, new)
        if device.type == "cuda" and self.folder is not None:
            raise ValueError(f"folder must be None for CUDA tensors, which no file holds, got {str(self.folder)!r}")
        super().check_new(keys.detach().cpu(), values.detach().cpu())

    def _check_due(self) -> None:
        self._check_process()

    def _check_crop(self, n_tokens: int) -> int:
        self._check_process()
        return super()._check_crop(n_tokens)

    def _check_process(self) -> None:
        """Refuse a process that was forked from the one that made the cache: the file is one for both."""
        if os.getpid() != self._process:
            rule = f"a TieredRecallCache must be used by the process that made it, {self._process}"
            raise RuntimeError(f"{rule}, whose file others would write to, got {os.getpid()}: make a new one there")

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        if self._held is None:
            self._near_backend = super()._step_backend(keys, values)
            self.body = copy.copy(self.body)
            self.device = self.body.device = keys.device
        super()._extend(keys.detach().cpu(), values.detach().cpu())

    def _step_backend(self, keys: Tensor, values: Tensor) -> str:
        """The one for the fast tier: `keys` and `values` have come to the host already."""
        return self._near_backend

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        self._check_process()
        if self._held is None:
            return
        moved = tuple(self._slow((len(indices), *array.shape[1:]), array.dtype) for array in self._held)
        for new, old in zip(moved, self._held, strict=True):
            torch.index_select(old, 0, indices.cpu(), out=new)
        rows = torch.arange(self._held[0].shape[:-2].numel(), device=self.device)
        rows = rows.reshape(len(self._held[0]), -1).index_select(0, indices.to(self.device)).flatten()
        self._select_problems(rows)
        self._held = moved[0], moved[1]

    @property
    def _near_device(self) -> torch.device:
        return self.device

    def _reached(self, taken: list[Tensor] | None) -> Reached:
        self._check_process()
        return self._brought(taken)

    def _in_order_of_arrival(self, array: Tensor) -> Tensor:
        return super()._in_order_of_arrival(array.to(self.device))

    def _move_to_room_for(self, tokens: int, like: tuple[Tensor, ...]) -> None:
        rows = with_room(tokens, least=self.settings.segment_size, share=8)
        self._held = move_to_room(self._held, self._n_held, like, rows, lambda shape, new: self._slow(shape, new.dtype))

    def _allocator(self) -> Callable[[tuple[int, ...]], Tensor]:
        return partial(slow_memory, dtype=torch.uint8, device=self.device, folder=self.folder)

    def _slow(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return slow_memory(shape, dtype, self.device, self.folder)


def slow_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: str | Path | None) -> Tensor:
    """Slow memory for tensors of `device` that belongs to this process alone."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")
    return mapped_memory(shape, dtype, folder)


def mapped_memory(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    """Memory backed by a file without a name, its blocks reserved, as a tensor."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            memory = mmap.mmap(file.fileno(), nbytes)  # keeps the file open
    except OSError as error:
        where = tempfile.gettempdir() if folder is None else str(folder)
        rule = f"the slow tier needs a file of {nbytes:,} bytes and got none"
        raise OSError(error.errno, f"{error.strerror}: {rule}", where) from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)
