"""Files while other processes or a full disk are at them: a whole cache or one clear error, nothing left behind."""

import itertools
import json
import multiprocessing
import os
import resource

import pytest
import torch
from models import random_tokens, tiny_llama
from safetensors.torch import save_file

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, saving, tensor_files
from kvcluster.fast.huggingface.tensor_files import DTYPES, TensorFile

FORK = multiprocessing.get_context("fork")
MODEL = tiny_llama()


def made(n_tokens):
    cache = ClusteredCache.for_model(MODEL, keep_ratio=0.25, chunk_size=16, n_recent=8, method=SoftMatching())
    with torch.no_grad():
        MODEL(random_tokens(n_tokens, batch=2), past_key_values=cache)
    return cache


CACHE, LONGER = made(150), made(180)


def in_a_child(function):
    """The exit code of a process of its own that runs `function`."""
    child = FORK.Process(target=function)
    child.start()
    child.join(60)
    return child.exitcode


class Stalled:
    """A process that saves `CACHE` to a path and stops in the middle, at one of the functions that saving calls."""

    def __init__(self, path, where):
        self.is_there, self.may_go_on = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=self.save, args=(path, where))
        self.process.start()
        assert self.is_there.wait(30)

    def save(self, path, where):
        module = tensor_files if where == "save_file" else os
        function = getattr(module, where)

        def stall(*arguments):
            if where == "save_file":
                arguments[1].write_bytes(b"half of it")
            self.is_there.set()
            self.may_go_on.wait(60)
            return function(*arguments)

        setattr(module, where, stall)
        CACHE.save(path)

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self):
        self.may_go_on.set()
        self.process.join(60)
        assert self.process.exitcode == 0


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_what_killed_saves_left_goes_with_the_next_one_and_what_runs_stays(where, tmp_path):
    path, other = tmp_path / "cache", tmp_path / "other"
    LONGER.save(path)
    for _ in range(3):
        Stalled(path, where).kill()
    assert len(os.listdir(tmp_path)) > 1
    assert ClusteredCache.load(path, MODEL).n_seen == 180
    running = Stalled(other, where)
    CACHE.save(path)
    [left] = set(os.listdir(tmp_path)) - {"cache"}
    running.end()
    assert sorted(os.listdir(tmp_path)) == ["cache", "other"], left
    assert [ClusteredCache.load(each, MODEL).n_seen for each in (path, other)] == [150, 150]


def test_many_save_to_one_path_at_once(tmp_path):
    def save_again_and_again():
        for _ in range(10):
            CACHE.save(tmp_path / "cache")

    children = [FORK.Process(target=save_again_and_again) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert ClusteredCache.load(tmp_path / "cache", MODEL).n_seen == 150
    assert os.listdir(tmp_path) == ["cache"]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "cache"
    CACHE.save(path)
    old = path.read_bytes()

    def save_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=f"path must be writable, got {path}: .*File too large"):
            LONGER.save(path)

    assert in_a_child(save_with_little_room) == 0
    assert (path.read_bytes(), os.listdir(tmp_path)) == (old, ["cache"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_where_one_may_not_read_or_write_is_said(tmp_path):
    path = tmp_path / "cache"
    CACHE.save(path)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)

    def try_as_another_user():
        os.setuid(12345)
        with pytest.raises(PermissionError, match=r"path must be writable: Permission denied: .*/cache"):
            CACHE.save(path)
        with pytest.raises(PermissionError, match=r"Permission denied: .*/cache"):
            ClusteredCache.load(path, MODEL)

    assert in_a_child(try_as_another_user) == 0
    assert os.listdir(tmp_path) == ["cache"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(ValueError, match="path must be a file, got "):
            CACHE.save(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_a_file_that_is_replaced_while_it_is_read_is_the_one_or_the_other(tmp_path):
    path = tmp_path / "cache"
    caches = {tmp_path / "short": CACHE, tmp_path / "long": LONGER}
    for kept, cache in caches.items():
        cache.save(kept)
    os.link(tmp_path / "long", path)

    def replace_again_and_again():
        for kept in itertools.cycle(caches):
            os.link(kept, tmp_path / "next")
            os.replace(tmp_path / "next", path)

    child = FORK.Process(target=replace_again_and_again)
    child.start()
    try:
        read = [ClusteredCache.load(path, MODEL).n_seen for _ in range(80)]
    finally:
        child.kill()
        child.join()
    assert set(read) == {150, 180}


@pytest.mark.parametrize("kept", [0, 1000, 0.5, 1.0])
def test_a_file_that_is_cut_while_it_is_read_is_refused(kept, monkeypatch, tmp_path):
    """In a process of its own, which reading the pages of a cut file would end."""
    path = tmp_path / "cache"
    CACHE.save(path)
    size = path.stat().st_size
    fingerprint = saving.fingerprint

    def cut(model):
        os.truncate(path, int(kept * size) - 1 if isinstance(kept, float) else kept)
        return fingerprint(model)

    def load_what_is_cut():
        monkeypatch.setattr(saving, "fingerprint", cut)
        with pytest.raises(ValueError, match=f"path must be a whole safetensors file, got {path}: "):
            ClusteredCache.load(path, MODEL)

    assert in_a_child(load_what_is_cut) == 0


def test_tensors_are_read_as_the_library_wrote_them(tmp_path):
    numbers = torch.arange(6).reshape(2, 3)
    tensors = {name: numbers.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "": torch.ones(1)}
    save_file(tensors, tmp_path / "file", {"a": "b"})
    with open(tmp_path / "file", "rb") as file:
        read = TensorFile(file, "file")
        assert (read.metadata, set(read.tensors)) == ({"a": "b"}, set(tensors))
        for name, tensor in tensors.items():
            got = read.get_tensor(name)
            assert (got.dtype, got.shape, got.tolist()) == (tensor.dtype, tensor.shape, tensor.tolist())


def entry(*offsets, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff",
        b"[" * 10**5,
        [],
        {"x": 1},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": entry(0, 8, dtype="F31")},
        {"x": entry(0, 8, 8)},
        {"x": entry(0, 8, shape=(3,))},
        {"x": entry(0, 8, shape=(-1, -2))},
        {"x": entry(0, 8, shape=(2.0,))},
        {"x": entry(0, 8, shape=(True, 2))},
        {"x": entry(0, 8, shape=2)},
        {"x": entry(-8, 0)},
        {"x": entry(8, 16)},
        {"x": entry(0, 8), "y": entry(0, 8)},
        {"x": entry(0, 4, shape=(1,))},
        {"x": entry(0, 2**70, shape=(2**68,))},
        {},
    ],
    ids=lambda header: repr(header)[:60],
)
def test_headers_that_describe_no_file_are_refused(header, tmp_path):
    """Of a file with 8 bytes of numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    for length in (len(text), len(text) + 9, 2**63):
        (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + text + bytes(8))
        with (
            open(tmp_path / "file", "rb") as file,
            pytest.raises(ValueError, match="path must be a whole safetensors file, got it: "),
        ):
            TensorFile(file, "it")
