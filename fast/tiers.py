"""A recall cache in two tiers: all keys and values in slow memory, the clusters selected lately in fast memory."""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from .arguments import check_integer, check_shape
from .backends import AnyBackend
from .exact.entries import Reached
from .exact.tiers import Exact
from .memory.body_clusters import BodyClusters
from .memory.fast_tier import FastTier, TierStatistics
from .memory.ordinary import on_ordinary_tensors
from .memory.room import move_to_room, with_room
from .memory.segments import RecallSettings
from .recall_cache import RecallCache

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
    OSError : from `append`, `extend` and `select`, where the disk is full. The cache is then as it was, and usable.

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
        check_integer("n_steps", n_steps, least=1)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"folder must be an existing folder, got {str(folder)!r}")
        self.folder, self.n_steps = folder, n_steps
        self.device = torch.device("cpu")
        self.statistics = TierStatistics()
        self._near: FastTier | None = None

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
        return 0 if self._held is None else sum(array.nbytes for array in self._held)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        check_shape("keys", keys)
        check_shape("values", values)
        device = keys.device if self._held is None else self.device
        for name, new in (("keys", keys), ("values", values)):
            if new.device != device:
                raise ValueError(f"{name} must be on the device of the cache, {device}, got {new.device}")
        if device.type == "cuda" and self.folder is not None:
            raise ValueError(f"folder must be None for CUDA tensors, which no file holds, got {str(self.folder)!r}")
        if self._held is None:
            self._backend_of_steps = super()._step_backend(keys, values)
        self.device = device
        super().extend(keys.detach().cpu(), values.detach().cpu())
        self.body.device = device

    def _step_backend(self, keys: Tensor, values: Tensor) -> str:
        """The one for the fast tier: `keys` and `values` have come to the host already."""
        return self._backend_of_steps

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        if self._held is None:
            return
        moved = tuple(self._slow((len(indices), *array.shape[1:]), array.dtype) for array in self._held)
        for new, old in zip(moved, self._held, strict=True):
            torch.index_select(old, 0, indices.cpu(), out=new)
        rows = torch.arange(self._held[0].shape[:-2].numel(), device=self.device)
        rows = rows.reshape(len(self._held[0]), -1).index_select(0, indices.to(self.device)).flatten()
        self.body.select_rows(rows)
        if self._near is not None:
            self._near.select_rows(rows)
        self._held = moved[0], moved[1]

    def crop(self, n_tokens: int) -> None:
        super().crop(n_tokens)
        if self._held is None:
            self._near = None
        elif self._near is not None and n_tokens > 0:
            self._near.keep(self._before[1], min(self.settings.n_sink, self.n_seen))

    def _with_clusters_of(self, choices: list[Tensor] | None) -> "FastTier":
        """The fast tier, once all that this step attends to lies there."""
        if self._near is None:
            self._near = FastTier(self._held, self.device, self.settings.budget, self._backend_of_steps)
        near, n_exact, problems = self._near, self.n_seen - self.n_clustered, len(self._flat(self._held[0]))
        counts, first_member, n_sink = self.body.counts, self.body.first_member, self.settings.n_sink
        if choices is None:
            counts = first_member = torch.zeros(problems, 0, dtype=torch.int64, device=self.device)
            choices = [counts]
        sizes = near.replace(choices, counts, self.n_steps, self.statistics)
        near.make_room(n_exact, sizes)
        first = near.first_new_exact(self.n_clustered, n_sink)
        near.bring(self._held, Exact(first, n_exact, n_sink, self.n_clustered), first_member, sizes)
        near.n_exact, near.n_clustered = n_exact, self.n_clustered
        self.statistics.nbytes_moved += int(sizes.sum()) * near.nbytes_of_token
        return near

    def _reached(self, taken: list[Tensor] | None) -> Reached:
        near = self._with_clusters_of(taken)
        keys, values = near.held
        # exact rows come first there, then clusters
        return Reached(keys, values, near.first_row, n_sink=0, n_body=0, n_exact=self._n_exact)

    def _in_order_of_arrival(self, array: Tensor) -> Tensor:
        return super()._in_order_of_arrival(array.to(self.device))

    def _move_to_room_for(self, tokens: int, like: tuple[Tensor, ...]) -> None:
        rows = with_room(tokens, least=self.settings.segment_size, share=8)
        self._held = move_to_room(self._held, self.n_seen, like, rows, lambda shape, new: self._slow(shape, new.dtype))

    def _slow(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Slow memory that belongs to this process alone."""
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return mapped_memory(shape, dtype, self.folder)


def mapped_memory(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    """Memory backed by a file without a name, its blocks reserved, as a tensor."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            memory = mmap.mmap(file.fileno(), nbytes)  # keeps the file open
    except OSError as error:
        where = tempfile.gettempdir() if folder is None else str(folder)
        rule = f"the slow tier needs a file of {nbytes:,} bytes and got none, the cache is as it was"
        raise OSError(error.errno, f"{error.strerror}: {rule}", where) from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)
