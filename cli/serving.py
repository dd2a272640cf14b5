"""`kvcluster serve-demo`: vLLM's server, stock and with clustered pages, with the same pool and the same clients."""

import importlib.util
from typing import Annotated

import typer

from .refusing import fail

__all__ = ["serve_demo"]


def serve_demo(
    keep_ratio: Annotated[float, typer.Option(help="Entries kept / tokens of a clustered chunk, in (0, 1].")] = 0.25,
    conversations: Annotated[int, typer.Option(min=1, max=32, help="Conversations that begin at once.")] = 9,
    tokens: Annotated[int, typer.Option(min=128, max=4096, help="Tokens of each conversation's text.")] = 1000,
    answer: Annotated[int, typer.Option(min=2, max=1024, help="Tokens of each answer.")] = 240,
    blocks: Annotated[int, typer.Option(min=8, max=4096, help="Blocks of the pool, of 32 tokens each.")] = 130,
) -> None:
    """Serve conversations by vLLM on this machine, stock and then clustered, and compare what the pool held.

    Needs the environment that `make vllm` makes. Its servers listen on a socket that only this user can open,
    and to a key of their own.
    """
    for name in ("vllm", "openai"):
        if importlib.util.find_spec(name) is None:
            fail("serve-demo", f"{name} is not installed; run it as make serve-demo")
    import openai

    from kvcluster.evaluation.serving.run import run_demo
    from kvcluster.evaluation.serving.server import ServerFailedError

    try:
        run_demo(keep_ratio=keep_ratio, n_conversations=conversations, n_text=tokens, n_new=answer, n_blocks=blocks)
    except (ServerFailedError, openai.APIError, ValueError) as error:
        fail("serve-demo", str(error))
