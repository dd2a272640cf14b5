"""The worked example of CONTRIBUTING.md: a new clustering method, and how few existing files it edits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT, installed_files

EXAMPLE = Path(__file__).with_name("new_method")
MOST = 6
SECTION = """
## 21 `neighbour_merging`

**21.1** Token `t` of a chunk of `size` tokens goes to entry `floor(t * target / size)`.
"""
EDITS = {  # of existing files: what stands there, and what stands there afterwards
    "reference/SPECIFICATION.md": [("\n## 16 ", f"{SECTION}\n## 16 ")],
    "reference/__init__.py": [
        ("from .merging import", "from .neighbour_merging import Neighbours, neighbour_merging\nfrom .merging import"),
        ('    "RecallCache",\n', '    "Neighbours",\n    "RecallCache",\n'),
        ('    "merge",\n', '    "merge",\n    "neighbour_merging",\n'),
    ],
    "fast/methods.py": [
        ("from .exact.chunks", "from .neighbour_merging import Neighbours\nfrom .exact.chunks"),
        ('    "distinctive": Distinctive,\n', '    "distinctive": Distinctive,\n    "neighbours": Neighbours,\n'),
    ],
    "evaluation/quality/methods.py": [
        (
            "from kvcluster.fast import Attended, Distinctive,",
            "from kvcluster.fast import Attended, Distinctive, Neighbours,",
        ),
        (
            '    "recall": Method(',
            '    "neighbours": Method(alike(Neighbours()), "runs", is_blind=True),\n    "recall": Method(',
        ),
    ],
    "conformance/operations/__init__.py": [('    "merge",\n', '    "merge",\n    "neighbour_merging",\n')],
}
EDITS["fast/__init__.py"] = EDITS["reference/__init__.py"]

USE = """
import sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
import kvcluster
from kvcluster import conformance, fast, reference
from kvcluster.evaluation.quality import METHODS
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.methods import method_of, spelled
from kvcluster.fast.vllm.settings import Settings

assert kvcluster.__file__.startswith(sys.argv[1])
rules = {"keep_ratio": 0.3, "chunk_size": 13, "n_sink": 2, "n_recent": 5}
keys, values = np.random.default_rng(0).standard_normal((2, 3, 100, 8)).astype(np.float32)
ours = fast.ClusteredCache(method=fast.Neighbours(), **rules)
theirs = reference.ClusteredCache(method=reference.Neighbours(), **rules)
ours.append(*map(torch.from_numpy, (keys, values)))
theirs.append(keys, values)
assert theirs.n_stored < 100
for name in ("keys", "values", "counts"):
    assert getattr(ours, name).contiguous().numpy().tobytes() == getattr(theirs, name).tobytes(), name

report = conformance.check(conformance.Implementation(fast), only=("neighbour_merging",))
assert report.agrees and report.operations[0].n_cases == 12, report

assert method_of(**spelled(fast.Neighbours())) == fast.Neighbours()
assert Settings(0.25, method="neighbours").rule(32).method == fast.Neighbours()
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
cache = ClusteredCache.for_model(model, method=fast.Neighbours(), **rules)
model.generate(torch.arange(50)[None], past_key_values=cache, max_new_tokens=5, do_sample=False)
cache.save(sys.argv[1] + "/cache.safetensors")
loaded = ClusteredCache.load(sys.argv[1] + "/cache.safetensors", model)
assert (loaded.n_stored, loaded.parameters["method"]) == (cache.n_stored, fast.Neighbours())
assert METHODS["neighbours"].make(model, 0.5, 1000).parameters["method"] == fast.Neighbours()
print("a method like any other")
"""


def with_the_example(folder, edits):
    """kvcluster with the new files in their places and the existing ones edited, importable from `folder`."""
    places = installed_files()
    for path, place in places.items():
        to = folder / place
        to.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes()
        for old, new in edits.get(path.relative_to(ROOT).as_posix(), ()):
            assert text.decode().count(old) == 1, (path, old)
            text = text.decode().replace(old, new).encode()
        to.write_bytes(text)
    for path in EXAMPLE.rglob("*.py"):
        to = folder / "kvcluster" / path.relative_to(EXAMPLE)
        assert not to.exists()
        to.write_bytes(path.read_bytes())


def use(folder):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-c", USE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)


@pytest.mark.slow
def test_the_new_method_works_everywhere(tmp_path):
    with_the_example(tmp_path, EDITS)
    done = use(tmp_path)
    assert done.stdout == "a method like any other\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [name for name in EDITS if name.endswith(".py")])
def test_each_edit_is_needed(left_out, tmp_path):
    with_the_example(tmp_path, {name: edits for name, edits in EDITS.items() if name != left_out})
    assert use(tmp_path).returncode != 0


def test_contributing_counts_these_files():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    part = page.partition("## How to add a method")[2].partition("\n## ")[0]
    listed, number = (
        re.findall(r"(?m)^- `([^`]+)`", part),
        re.search(r"Existing files that a method edits, (\d+) of", part),
    )
    assert sorted(listed) == sorted(EDITS)
    assert int(number[1]) == len(EDITS) <= MOST
