"""Tests of the vLLM plugin, in its own environment by `make test-vllm`; without vLLM those of pages and of settings.

Engines run inside the test's process, so that the scheduler's blocks and the worker's pages can be looked at.
"""

import importlib.util
import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest

FOUND = importlib.util.find_spec("vllm")
HAS_VLLM = FOUND is not None and FOUND.origin is not None  # this folder is a namespace of that name
WITHOUT_VLLM = ("test_paged.py", "test_settings.py")
collect_ignore = (
    [] if HAS_VLLM else [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in WITHOUT_VLLM]
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama of three layers, 4 query heads and 2 KV heads."""
    from models import tiny_llama

    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(head_dim=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(tiny):
    """An engine with given options, made once for all tests that ask for the same."""
    from engines import Engine

    made = {}

    def make(kvcluster=None, model=tiny, **options):
        key = repr((kvcluster, str(model), sorted(options.items())))
        if key not in made:
            made[key] = Engine(model, kvcluster, **options)
        return made[key]

    return make
