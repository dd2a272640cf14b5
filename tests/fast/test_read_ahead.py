"""Reading ahead of a step: the right pages of the file, by a thread that no result depends on."""

import copy
import ctypes
import mmap
import os
import threading
import time

import pytest
import torch
from caches import make_tiered
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast
from kvcluster.fast.memory import read_ahead

PARAMETERS = {"budget": 64, "n_sink": 4, "tokens_per_cluster": 16, "max_iter": 2, "backend": "cpp"}
N_TOKENS, DIM = 4096, 256  # a token's key is a quarter of a page, so a cluster's keys are four
LIBC = ctypes.CDLL(None, use_errno=True)
PAGE_OUT = 21  # MADV_PAGEOUT of Linux


def drop_pages(tensor):
    """Have the system forget the pages of a mapped file; skip where it keeps them."""
    os.sync()
    LIBC.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), PAGE_OUT)
    if resident(tensor).sum() > len(resident(tensor)) / 4:
        pytest.skip("this system keeps the pages of a file in memory")


def resident(tensor):
    """Which pages of a mapped file are in memory."""
    flags = (ctypes.c_ubyte * -(-tensor.nbytes // mmap.PAGESIZE))()
    LIBC.mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), flags)
    return torch.tensor(list(flags)) % 2 == 1


@pytest.fixture
def cache(tmp_path):
    cache = make_tiered(folder=tmp_path, n_ahead=128, **PARAMETERS)
    cache.append(*(to_torch(make_keys("normal", (1, N_TOKENS, DIM), DTYPES["f32"], seed)) for seed in (1, 2)))
    return cache


QUERY = to_torch(make_keys("normal", (1, 2, DIM), DTYPES["f32"], 3))


def wanted_pages(cache, tensor, n_tokens):
    """Pages of the best clusters of `n_tokens` tokens in all that are not in the fast tier."""
    taken = cache.body.take(QUERY, n_tokens)[0][0]
    pages = set()
    for cluster in ((taken == cache.body.counts[0]) & (taken > 0) & (cache._near.first_row[0] < 0)).nonzero().flatten():
        first = cache.settings.n_sink + int(cache.body.first_member[0, cluster])
        row = DIM * tensor.itemsize
        last_byte = (first + int(taken[cluster])) * row - 1
        pages |= set(range(first * row // mmap.PAGESIZE, last_byte // mmap.PAGESIZE + 1))
    return sorted(pages)


@pytest.mark.parametrize("is_read_ahead", [True, False], ids=["read ahead", "not read ahead"])
def test_the_next_clusters_are_read_from_the_file(cache, monkeypatch, is_read_ahead):
    """Without it their pages are not there: a wrong twin."""
    tasks = []
    monkeypatch.setattr(fast.tiers, "soon", tasks.append)
    cache.attend(QUERY)
    [task] = tasks
    for tensor in cache._held:
        drop_pages(tensor)
    if is_read_ahead:
        task()
    for tensor in cache._held:
        wanted = wanted_pages(cache, tensor, PARAMETERS["budget"] + 128)
        assert len(wanted) > 8
        until = time.monotonic() + 5
        while is_read_ahead and not resident(tensor)[wanted].all() and time.monotonic() < until:
            time.sleep(0.01)  # the system reads on its own
        assert bool(resident(tensor)[wanted].all()) == is_read_ahead


def test_nothing_is_read_ahead_before_there_is_a_body_or_unless_asked(tmp_path, monkeypatch):
    tasks = []
    monkeypatch.setattr(fast.tiers, "soon", tasks.append)
    for n_tokens, n_ahead in ((5, 128), (400, 0)):
        cache = make_tiered(folder=tmp_path, n_ahead=n_ahead, **PARAMETERS)
        cache.append(*(torch.randn(1, n_tokens, DIM) for _ in range(2)))
        cache.attend(QUERY)
    assert tasks == []


def test_a_copy_of_a_cache_that_reads_ahead_goes_on(cache):
    cache.attend(QUERY)
    copied = copy.deepcopy(cache)
    assert torch.equal(copied.attend(2 * QUERY), cache.attend(2 * QUERY))


def test_a_task_that_fails_stops_no_other_and_too_many_are_left_out():
    begun, may_end, done = threading.Event(), threading.Event(), threading.Event()

    def fails():
        begun.set()
        may_end.wait(60)
        raise MemoryError

    read_ahead.soon(fails)
    assert begun.wait(60)
    ran = []
    for _ in range(2 * read_ahead.MOST_WAITING):
        read_ahead.soon(lambda: ran.append(1))
    may_end.set()
    while not read_ahead.waiting().empty():
        time.sleep(0.01)
    read_ahead.soon(done.set)
    assert done.wait(60)
    assert len(ran) == read_ahead.MOST_WAITING


def test_a_child_process_has_a_thread_of_its_own():
    read_ahead.soon(lambda: None)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        read_ahead.soon(lambda: os.write(writes, b"x"))
        time.sleep(30)
        os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"x"
    os.close(reads)
    os.kill(child, 9)
    os.waitpid(child, 0)
