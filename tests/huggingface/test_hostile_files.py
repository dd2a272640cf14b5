"""Files whose hashes are right and whose contents are not: each field of each cache, wrong in each way."""

import copy
import gc
import hashlib
import json

import pytest
import torch
from families import tiny
from models import random_tokens, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_caches import CACHES

from kvcluster.fast.huggingface.saving import digest

MODEL = tiny_llama()
PADDED = {"clustered", "recall"}  # rows of different lengths, in groups
# What an honest file may hold as well: the last append was of a prompt or not, the first one of another length.
MAY_DIFFER = {"is_prompt", "n_first"}
OF_LATER_VERSIONS = {"n_body", "n_clustered_before", "n_clusters_before"}  # than 0.1, whose files are read


@pytest.fixture(scope="module", params=[*CACHES, "sliding"])
def honest(request, tmp_path_factory):
    """The model, class, path, tensors and description of a saved cache; the first layer may have a sliding window."""
    model = tiny("qwen3-sliding")[0] if request.param == "sliding" else MODEL
    kind, parameters = CACHES.get(request.param, CACHES["bits"])
    path = tmp_path_factory.mktemp("honest") / "cache"
    cache, tokens = kind.for_model(model, **parameters), random_tokens(150, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, : 7 if request.param in PADDED else 0] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        model(tokens[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], dim=1), past_key_values=cache)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["description"])
    return model, kind, path, load_file(path), description


def write(path, tensors, description):
    """As `save_cache` does, with hashes that are right."""
    description = description | {"tensors": {name: digest(array) for name, array in tensors.items()}}
    text = json.dumps(description)
    header = {
        "format_version": "1",
        "description": text,
        "description_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    save_file({name: array.contiguous() for name, array in tensors.items()}, path, header)


def with_number(array, number):
    changed = array.clone()
    changed.view(-1)[changed.numel() // 2] = number
    return changed


def wrong_tensors(array):
    """Other dtypes and shapes of a tensor, and numbers that it cannot hold."""
    yield "float64", array.double()
    yield "int16", array.to(torch.int16)
    yield "one axis more", array.unsqueeze(0)
    yield "one axis", array.flatten()
    yield "nothing", array.flatten()[:0]
    for axis in range(array.ndim):
        yield f"more along axis {axis}", torch.cat([array, array.narrow(axis, 0, 1)], dim=axis)
        yield f"less along axis {axis}", array.narrow(axis, 0, array.shape[axis] - 1)
    if array.dtype.is_floating_point:
        yield from ((str(number), with_number(array, number)) for number in (float("nan"), float("inf")))
    elif array.dtype != torch.uint8:
        info = torch.iinfo(array.dtype)
        for number in (-1, 10**6, info.min, info.max):
            yield str(number), with_number(array, number)
        yield "one number throughout", torch.full_like(array, 1)
    else:
        yield "bytes", torch.full_like(array, 255)


def wrong_numbers(value):
    yield from (None, "7", 1.5, [value], {}, -1, 10**15, 2**70)
    if isinstance(value, int) and not isinstance(value, bool):
        yield from (value + 1, value - 1, 0)
    if isinstance(value, list):
        yield from (value[1:], [*value, 1], [*value[:-1], -5], [10**15] * len(value), [None] * len(value))


def numbers_of(description):
    """Every number that a file holds of its first layer, as the keys that lead there."""
    numbers = description["layers"][0]
    if "groups" not in numbers:
        return [("layers", 0, name) for name in numbers]
    of_group = "layers", 0, "groups", 1
    return [("layers", 0, "groups"), *((*of_group, name) for name in ("padding", "rows", "numbers"))] + [
        (*of_group, "numbers", name) for name in numbers["groups"][1]["numbers"]
    ]


def changes(tensors, description):
    """(what, field, tensors, description) of files that are wrong in one way."""
    for name in [name for name in tensors if name.startswith("layers.0.")]:
        for what, array in wrong_tensors(tensors[name]):
            if digest(array) != digest(tensors[name]):
                yield f"{name}: {what}", name, tensors | {name: array}, description
        yield f"{name}: missing", name, {other: x for other, x in tensors.items() if other != name}, description
    yield "another tensor", "", tensors | {"layers.0.more": torch.ones(3)}, description
    yield "a layer too many", "", tensors | {"layers.9.keys": torch.ones(3)}, description
    for *place, name in numbers_of(description):
        value = description
        for key in (*place, name):
            value = value[key]
        for wrong in wrong_numbers(value):
            if repr(wrong) != repr(value):
                yield f"{name}: {wrong!r:.40}", name, tensors, replaced(description, place, name, wrong)
        if name not in OF_LATER_VERSIONS:
            yield f"{name}: missing", name, tensors, replaced(description, place, name)
        yield f"{name}: another beside it", name, tensors, replaced(description, place, "another", 1)
    for wrong in (None, [], {}, "x", description["layers"][1:]):
        yield f"layers: {wrong!r:.40}", "layers", tensors, description | {"layers": wrong}
    for wrong in (0, 10**15, None, "x"):
        yield f"n_seen of all: {wrong!r}", "n_seen", tensors, description | {"n_seen": wrong}


def replaced(description, place, name, *value):
    """A copy with another value there, or none."""
    changed = copy.deepcopy(description)
    inner = changed
    for key in place:
        inner = inner[key]
    if value:
        inner[name] = value[0]
    else:
        inner.pop(name)
    return changed


def go_on(model, cache):
    """The model's logits after three more tokens, of which one is taken out again."""
    mask = torch.ones(2, cache.n_seen + 3, dtype=torch.int64)
    for row, padding in enumerate(cache.padding or ()):
        mask[row, :padding] = 0
    with torch.no_grad():
        logits = model(random_tokens(3, batch=2), attention_mask=mask, past_key_values=cache).logits
    if not cache.windows:  # of transformers, which take no tokens out when they are full
        cache.crop(-1)
    return logits


def test_hostile_files_are_refused_by_the_field(honest, tmp_path):
    """Or could be honest, and then the model goes on with it."""
    model, kind, _, tensors, description = honest
    n_refused, used = 0, []
    for what, field, wrong_tensors_, wrong_description in changes(tensors, description):
        path = tmp_path / "wrong"
        write(path, wrong_tensors_, wrong_description)
        try:
            cache = kind.load(path, model)
        except ValueError:
            n_refused += 1
            continue
        used.append((what, field))
        assert go_on(model, cache).isfinite().all()
    gc.collect()
    assert n_refused > 50
    assert [what for what, field in used if field not in MAY_DIFFER] == []


def test_the_honest_file_is_used(honest, tmp_path):
    model, kind, path, tensors, description = honest
    write(tmp_path / "again", tensors, description)
    first, second = (go_on(model, kind.load(each, model)) for each in (path, tmp_path / "again"))
    assert torch.equal(first, second)
