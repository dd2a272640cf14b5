"""vLLM's server with a tiny model, and a client that streams from it."""

import time

from engines import PAGE, random_prompts
from models import save_llama, tiny_llama

from kvcluster.evaluation.serving.server import NAME, Server

PROMPTS = random_prompts([300, 420, 600, 161], seed=7)
N_BLOCKS = 60
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


def model_with_tokenizer(folder):
    """The model of the other tests, which the server wants a tokenizer for."""
    save_llama(folder)
    tiny_llama(head_dim=32).save_pretrained(folder)
    return folder


def served(folder, kvcluster):
    options = {"dtype": "float32", "max-model-len": 1024, "max-num-batched-tokens": 1024}
    return Server(folder, kvcluster, n_blocks=N_BLOCKS, page=PAGE, options=options)


def client_of(server):
    return server.client(timeout=120)


async def stream_of(client, prompt, n_new):
    return await client.completions.create(model=NAME, prompt=prompt, max_tokens=n_new, stream=True, **GREEDY)


async def streamed(client, prompt, n_new, on_token=lambda: None):
    """The tokens of a streamed completion."""
    tokens = []
    async for part in await stream_of(client, prompt, n_new):
        tokens += part.choices[0].token_ids or []
        on_token()
    return tokens


def wait_for(server, holds):
    """The first metrics for which `holds` is true; they follow the engine by a step."""
    until = time.monotonic() + 60
    while not holds(metrics := server.metrics()):
        assert time.monotonic() < until, metrics
        time.sleep(0.05)
    return metrics


def is_idle(metrics):
    return metrics["running"] == metrics["waiting"] == metrics["used"] == 0
