"""A Llama that transformers shards over two processes: every rank clusters its own KV heads, and asks nobody.

On the CPU, through gloo. The ranks are started as a user would start them, by torch.distributed.run.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from caches import of_reference
from models import tiny_llama
from tensor_parallel_worker import PARAMETERS, outcome

from kvcluster import reference

pytest.importorskip("transformers.distributed", reason="this transformers shards no models by itself")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tensor_parallel")]

WORKER = Path(__file__).resolve().parents[1] / "tensor_parallel_worker.py"
CACHES = pytest.mark.parametrize("name", PARAMETERS)
RANKS = (0, 1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two_ranks(folder):
    """Both ranks of the model in `folder`; torch.distributed.run ends them when it is asked to end itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *address, str(WORKER), str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as ranks:
        try:
            output, _ = ranks.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            ranks.terminate()
            raise
    assert ranks.returncode == 0, output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What one process makes of each cache, and what each of the two ranks does: ({name: ...}, [{name: ...}])."""
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny_llama(heads=8, kv_heads=4)
    first = model.model.layers[0].self_attn  # its keys and values: half of the features each, no sum to be rounded
    first.k_proj.weight.data, first.v_proj.weight.data = torch.eye(128).split(64)
    model.save_pretrained(folder)
    run_two_ranks(folder)
    return {name: outcome(model, name) for name in PARAMETERS}, [
        torch.load(folder / f"rank{rank}.pt") for rank in RANKS
    ]


def own_heads(tensor, rank):
    """The KV heads of `rank` in a tensor (batch, kv_heads, ...) of one process."""
    return tensor.tensor_split(2, dim=1)[rank]


@CACHES
def test_two_ranks_generate_the_tokens_of_one_process(name, made):
    alone, ranks = made
    for rank in RANKS:
        assert torch.equal(ranks[rank][name]["tokens"], alone[name]["tokens"])
    if name != "full":
        assert not torch.equal(alone[name]["tokens"], alone["full"]["tokens"])  # compression made a difference


@pytest.mark.parametrize("moment", ["prompt", "end"])
@CACHES
def test_the_first_layer_of_a_rank_holds_the_bits_of_its_heads_in_one_process(name, moment, made):
    """Of the first layer, whose input is the same; the other rank's heads are others.

    A column of a product with a sliced matrix need not have the bits of the whole product's, as BLAS chooses its
    kernels by shape: the first layer's matrices leave it nothing to round, which the full cache shows.
    """
    alone, ranks = made
    for rank in RANKS:
        ours, expected = ranks[rank][name][moment][0], alone[name][moment][0]
        assert ours.keys() == expected.keys()
        for part in ours:
            assert_same_bits(ours[part], own_heads(expected[part], rank).contiguous().numpy())
            if part not in {"labels", "counts"}:
                assert not torch.equal(ours[part], own_heads(expected[part], 1 - rank))


def test_every_layer_of_a_rank_clusters_as_the_reference_clusters_the_keys_of_its_heads(made):
    """Deeper layers' keys are sums over ranks, rounded in another order; what is made of them is still exact."""
    for rank, held in enumerate(made[1]):
        for index, full in enumerate(held["full"]["prompt"]):
            keys, values = full["keys"].numpy(), full["values"].numpy()
            assert keys.shape == (2, 2, 150, 16)
            clustered = of_reference(**PARAMETERS["clustered"])
            clustered.append(keys, values)
            recall = reference.RecallCache(**PARAMETERS["recall"])
            recall.append(keys, values)
            for part in ("keys", "values", "counts"):
                assert_same_bits(held["clustered"]["prompt"][index][part], getattr(clustered, part))
            for part in ("labels", "counts", "centroids"):
                ours = held["recall"]["prompt"][index][part]
                assert_same_bits(ours, getattr(recall.clusters, part))
                other = made[1][1 - rank]["recall"]["prompt"][index][part]
                assert not np.array_equal(ours, other)


@pytest.mark.parametrize("name", ["clustered", "recall"])
def test_clustering_and_recalling_add_no_communication(name, made):
    for held in made[1]:
        assert held[name]["collectives"] == held["full"]["collectives"] > 0
