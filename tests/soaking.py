"""Random use of the caches of a model, beside a simple record of what each of them must hold.

What the cache must hold is what a cache
of the reference holds of each row of it, without its padding.
"""

import copy
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import KINDS, Fault, fault_at
from inputs import to_numpy
from peft import PeftModel
from records import Record
from torch import Tensor

from kvcluster.fast.huggingface.layers import EntryLayer
from kvcluster.fast.huggingface.row_groups import RowGroups

__all__ = ["Kind", "Soak", "recording", "what_lives"]

N_TOKENS = 97  # of the tiny models' vocabulary
MOST_TOKENS = 260  # of a cache, after which it begins anew
PLACES = (400, 4000)  # of faults, torch calls and lines, that are drawn from


@dataclass(frozen=True)
class Kind:
    """A kind of cache of a model, and the cache of the reference that each row of a layer must equal."""

    make: Callable[[Any], Any]
    like: Callable[[int], Any]


RECORDED = threading.local()


@contextmanager
def recording() -> Iterator[None]:
    """Within, what each layer of a cache takes is kept in `RECORDED.taken` of its thread, where that is a list."""
    update, observe = EntryLayer.update, RowGroups.observe

    def recorded_update(layer: Any, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> Any:
        if getattr(RECORDED, "taken", None) is not None:
            RECORDED.taken.append((layer.cache, [keys.detach().clone(), values.detach().clone()]))
        return update(layer, keys, values, *rest, **named)

    def recorded_observe(groups: Any, queries: Tensor) -> None:
        if getattr(RECORDED, "taken", None):
            next(piece for of, piece in reversed(RECORDED.taken) if of is groups).append(queries.detach().clone())
        observe(groups, queries)

    EntryLayer.update, RowGroups.observe = recorded_update, recorded_observe  # type: ignore[method-assign]
    try:
        yield
    finally:
        EntryLayer.update, RowGroups.observe = update, observe  # type: ignore[method-assign]
        RECORDED.taken = None


def held(cache: Any, row: int | None = None) -> dict[str, bytes]:
    """What a row of a cache of `fast` holds, or all of a cache of the reference."""
    if hasattr(cache, "select_clusters"):
        arrays = {"keys": cache.keys, "values": cache.values}
        if cache.clusters is not None:
            arrays |= {name: getattr(cache.clusters, name) for name in ("labels", "counts", "centroids")}
    else:
        arrays = dict(zip(("keys", "values", "counts"), cache.entries(), strict=True))
        is_entry = arrays["counts"][..., None] > 0  # beside a shorter head nothing is defined
        arrays |= {name: arrays[name] * is_entry for name in ("keys", "values")}
    plain = {name: array if row is None else to_numpy(array[row]) for name, array in arrays.items()}
    return {name: bytes(str(x.shape), "ascii") + np.ascontiguousarray(x).tobytes() for name, x in plain.items()}


def difference(kind: Kind, cache: Any, record: Record) -> str | None:
    """In what a cache differs from its record; None if in nothing."""
    if cache.n_seen != record.n_seen:
        return f"{cache.n_seen} tokens in place of {record.n_seen}"
    for index, layer in enumerate(cache.layers):
        if layer.is_sliding or record.n_seen == 0:
            continue
        own = [each for each in cache.layers if not each.is_sliding].index(layer)
        for row in range(len(record.tokens)):
            right, first = kind.like(index), 0
            for piece in record.pieces[own]:
                n = piece[0].shape[-2]
                real = record.mask(0)[row, first : first + n].bool()
                if bool(real.any()):
                    right.append(*(to_numpy(array[row][..., real, :]) for array in piece))
                first += n
            if not right.n_seen:
                continue
            ours, place = layer.cache.of_row(row)
            found, expected = held(ours, place), held(right)
            if found != expected:
                names = [name for name in expected if found.get(name) != expected[name]]
                return f"{', '.join(names)} of row {row} of layer {index} after {record.n_seen} tokens"
    return None


class Soak:
    """Random steps with caches of one kind on one model; all is drawn from `seed`, and files go into `folder`.

    Attributes
    ----------
    counted : how often each step was made, "caches" made, "faults" and what they left.
    """

    def __init__(
        self, name: str, kind: Kind, model: Any, seed: int, folder: Path, *, has_faults: bool = True, rows: int = 2
    ) -> None:
        self.name, self.kind, self.model, self.folder = name, kind, model, folder
        self.draw, self.has_faults, self.rows = random.Random(f"{name} {seed}"), has_faults, rows
        self.counted: Counter[str] = Counter()
        self.held: list[tuple[Any, Record]] = []
        self.files: list[tuple[Path, Record, list[str]]] = []
        self.begin()

    def begin(self) -> None:
        """A new cache, in whose batch one row is padded or none."""
        self.counted["caches"] += 1
        padding = torch.zeros(self.rows, dtype=torch.long)
        if self.draw.random() < 0.5:
            padding[self.draw.randrange(self.rows)] = self.draw.randint(1, 12)
        self.held.append((self.kind.make(self.model), Record(padding.new_zeros(self.rows, 0), padding)))

    def run(self, n_steps: int) -> None:
        steps = {"read": 5, "generate": 3, "crop": 3, "question": 2, "rows_picked": 2, "copy": 2, "save": 2, "load": 2}
        steps["adapter"] = 1 if isinstance(self.model, PeftModel) else 0
        for _ in range(n_steps):
            name = self.draw.choices(list(steps), list(steps.values()))[0]
            place = self.draw.randrange(len(self.held))
            self.counted[name] += 1
            getattr(self, name)(place)
            if len(self.held) > 3 or self.held[-1][1].n_seen > MOST_TOKENS:
                self.held.pop(self.draw.randrange(len(self.held) - 1) if len(self.held) > 3 else -1)
            if not self.held:
                self.begin()
        for place in range(len(self.held)):
            self.check(place)

    def check(self, place: int) -> None:
        found = difference(self.kind, *self.held[place])
        assert found is None, f"{self.name} after {dict(self.counted)}: {found}"

    def change(self, place: int, change: Callable[[Any], Any], after: Callable[[Any], Record]) -> None:
        """`change(cache)`, of which `after(its result)` is left; with a fault at times, when it may be as before."""
        cache, before = self.held[place]
        if not self.has_faults or self.draw.random() < 0.75:
            self.held[place] = cache, after(change(cache))
            if self.draw.random() < 0.3:
                self.check(place)
            return
        number = self.draw.randrange(2)
        result: list[Any] = []
        try:
            with fault_at(KINDS[number], self.draw.randrange(PLACES[number])):
                result.append(change(cache))
        except Fault:
            pass
        self.counted["faults"] += 1
        try:
            cache.check_whole()
            possible = [after(result[0])] if result else [before]
            if not result and cache.n_seen != before.n_seen:
                possible = [after(None)]
            elif not result:
                possible.append(after(None))
            found = [difference(self.kind, cache, record) for record in possible]
        except RuntimeError as error:
            if "failed halfway" not in str(error):
                raise
            cache.reset()
            self.held[place] = cache, Record(before.tokens[:, :0], before.padding)
            self.counted["refused"] += 1
            return
        assert None in found, f"{self.name} after a fault, {dict(self.counted)}: {found}"
        self.held[place] = cache, possible[found.index(None)]

    def taken(self, cache: Any) -> list[list[tuple[Tensor, ...]]]:
        """What each layer of ours has taken since `RECORDED.taken` was begun."""
        of_layers = [layer.cache for layer in cache.layers if not layer.is_sliding]
        return [[tuple(piece) for of, piece in RECORDED.taken if of is groups] for groups in of_layers]

    def tokens(self, n: int, place: int) -> Tensor:
        rows = len(self.held[place][1].tokens)
        return torch.tensor([[self.draw.randrange(N_TOKENS) for _ in range(n)] for _ in range(rows)])

    def read(self, place: int) -> None:
        record = self.held[place][1]
        n = self.draw.choice((1, 1, self.draw.randint(2, 20), self.draw.randint(20, 90)))
        new = self.tokens(n if record.n_seen else max(n, 20), place)

        def call(cache: Any) -> None:
            RECORDED.taken = []
            with torch.no_grad():
                self.model(input_ids=new, attention_mask=record.mask(new.shape[1]), past_key_values=cache)

        self.change(place, call, lambda _: record.with_more(new, self.taken(self.held[place][0])))

    def generate(self, place: int) -> None:
        """Some tokens by transformers' own loop; no fault, which may leave any number of them."""
        cache, record = self.held[place]
        new, n_made = self.tokens(self.draw.randint(13, 30), place), self.draw.randint(1, 6)
        given = torch.cat([record.tokens, new], dim=1)
        RECORDED.taken = []
        made = self.model.generate(
            input_ids=given,
            attention_mask=record.mask(new.shape[1]),
            past_key_values=cache,
            max_new_tokens=n_made,
            do_sample=False,
            pad_token_id=0,
        )
        self.held[place] = cache, record.with_more(made[:, record.n_seen : -1], self.taken(cache))

    def crop(self, place: int, most: int = 30) -> None:
        cache, record = self.held[place]
        n = self.draw.randint(0, min(most, cache.n_croppable, record.n_seen))
        self.change(place, lambda cache: cache.crop(-n), lambda _: record.cropped(n))

    def question(self, place: int) -> None:
        """Asked on a copy, then taken back, as far as can be, for the next one."""
        cache, record = self.held[place]
        self.held.append((copy.deepcopy(cache), record))
        for _ in range(2):
            self.read(len(self.held) - 1)
            self.crop(len(self.held) - 1, most=200)

    def rows_picked(self, place: int) -> None:
        record = self.held[place][1]
        if record.n_seen == 0:
            return
        name = self.draw.choice(("reorder_cache", "batch_select_indices"))
        rows = torch.tensor([self.draw.randrange(len(record.tokens)) for _ in range(self.draw.randint(1, 3))])
        self.change(place, lambda cache: getattr(cache, name)(rows), lambda _: record.of_rows(rows))

    def copy(self, place: int) -> None:
        cache, record = self.held[place]
        self.held.append((copy.deepcopy(cache), record))
        self.counted["caches"] += 1

    def save(self, place: int) -> None:
        """Into a new file, or in the place of an older one."""
        cache, record = self.held[place]
        path = self.folder / str(self.draw.randrange(4))
        self.change(place, lambda cache: cache.save(path), lambda _: record)
        cache, record = self.held[place]  # after a fault it may have been emptied
        cache.save(path)
        self.files = [each for each in self.files if each[0] != path] + [(path, record, adapters(self.model))]

    def load(self, place: int) -> None:
        if not self.files:
            return
        path, record, of_file = self.draw.choice(self.files)
        cache = self.held[place][0]
        if adapters(self.model) != of_file:
            try:
                type(cache).load(path, self.model)
            except ValueError as error:
                if "adapters of the model" not in str(error):
                    raise
                return
            raise AssertionError(f"a file of {of_file} was loaded with {adapters(self.model)}")
        self.held.append((type(cache).load(path, self.model), record))
        self.check(-1)
        self.counted["caches"] += 1

    def adapter(self, place: int) -> None:
        self.model.set_adapter(self.draw.choice(list(self.model.peft_config)))


def adapters(model: Any) -> list[str]:
    return list(model.active_adapters) if isinstance(model, PeftModel) else []


def what_lives(model: Any, folder: Path) -> dict[str, Any]:
    """What a run must leave as it was: tensors, hooks, configs, files that are open or in `folder`, threads."""
    gc.collect()
    modules = list(model.modules())
    return {
        "tensors": sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
        "hooks": sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in modules),
        "attention": sorted({x.config._attn_implementation for x in modules if hasattr(x, "config")}),
        "open files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
        "files": sorted(path.name for path in folder.iterdir() if not path.name.isdigit()),
        "threads": threading.active_count(),
    }
