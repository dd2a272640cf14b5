"""One rank of a Llama that transformers shards: what its caches hold. Run by test_tensor_parallel.py, under torchrun.

`held_after` and `outcome` also serve that test in one process, so that both sides do the same.
"""

import sys
from pathlib import Path

import torch
from models import greedy, random_tokens
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache

PARAMETERS = {
    "full": {},
    "clustered": {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()},
    "recall": {"budget": 40, "n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32},
}
PROMPT = random_tokens(150, batch=2)


def make_cache(model, name):
    if name == "full":
        return DynamicCache(config=model.config)
    cache_class = {"clustered": ClusteredCache, "recall": RecallCache}[name]
    return cache_class.for_model(model, **PARAMETERS[name])


def held_by(layer):
    """Keys, values and clusters of a layer of any cache, each (batch, kv_heads, ...)."""
    held = {"keys": layer.keys, "values": layer.values}
    rows = getattr(layer, "cache", None)
    if rows is not None:
        (cache,) = rows.caches
        if hasattr(cache, "clusters"):
            clusters = cache.clusters
            held |= {"labels": clusters.labels, "counts": clusters.counts, "centroids": clusters.centroids}
        else:
            held |= {"counts": cache.counts}
    return {name: tensor.clone() for name, tensor in held.items()}


def outcome(model, name):
    """The tokens of greedy generation; what each layer holds after the prompt, and at the end."""
    prompted, cache = make_cache(model, name), make_cache(model, name)
    with torch.no_grad():
        model(PROMPT, past_key_values=prompted)
    tokens = greedy(model, PROMPT, n_new=40, past_key_values=cache)
    return {
        "tokens": tokens,
        "prompt": [held_by(layer) for layer in prompted.layers],
        "end": [held_by(layer) for layer in cache.layers],
    }


class Collectives(TorchDispatchMode):
    """Counts the operations by which ranks exchange anything."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its own dispatch comes back with what it is made of
        self.count += operation.namespace in {"c10d", "_c10d_functional"}
        return operation(*args, **(kwargs or {}))


def main(folder):
    """Write what this rank makes of the model in `folder` beside it."""
    from transformers.distributed import DistributedConfig  # not in the oldest versions

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    made = {}
    for name in PARAMETERS:
        with Collectives() as collectives:
            made[name] = outcome(model, name)
        made[name]["collectives"] = collectives.count
    torch.save(made, folder / f"rank{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
