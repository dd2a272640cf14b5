"""Requests that are cancelled and processes that are killed.

Usable after a cancelled request means: the same engine goes on, its pool whole, its other requests undisturbed. A
killed worker or engine core takes the engine with it, in vLLM and so here: whoever waits is told by an error, at once,
and so is who asks later. What stays usable is the machine: a new engine starts and generates what the old one would
have, as nothing is kept outside of the processes.
"""

import asyncio
import contextlib

import openai
import psutil
import pytest
from engines import CLUSTERED, PAGE, random_prompts
from servers import client_of, model_with_tokenizer, served, streamed

PROMPTS = random_prompts([300, 437], seed=3)
VICTIM = random_prompts([600], seed=4)[0]
N_NEW = 120  # more than a chunk and what is not yet in one, so that generated tokens are clustered too
IN_PIECES = {"max_num_batched_tokens": 512}  # a prompt of 600 tokens takes three steps or more


def is_prefilled_in_part(request, rule):
    return 0 < request.num_computed_tokens < request.num_prompt_tokens


def is_clustered_but_not_freed(request, rule):
    """The worker has just clustered the prompt's chunks; the scheduler frees their holes in the next step."""
    return request.num_output_tokens == 1


def is_generating(request, rule):
    return request.num_output_tokens == 6


def has_clustered_generated_tokens(request, rule):
    """In the step before, a chunk with generated tokens was due."""
    n_prompt, n_done = request.num_prompt_tokens, request.num_computed_tokens
    return rule.n_chunks(n_done, n_prompt) > rule.n_chunks(max(n_prompt, n_done - 1), n_prompt)


MOMENTS = [is_prefilled_in_part, is_clustered_but_not_freed, is_generating, has_clustered_generated_tokens]


def generate_and_cancel(engine, moment):
    """The tokens of PROMPTS, served while another request is cancelled at a moment, and the blocks this gave back."""
    asked = [engine.ask(PROMPTS[0], N_NEW)]
    victim = engine.ask(VICTIM, N_NEW)
    asked.append(engine.ask(PROMPTS[1], N_NEW))
    (request,) = (each for each in engine.scheduler.requests.values() if each.num_prompt_tokens == len(VICTIM))
    finished, gone, returned = {}, False, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        finished |= engine.step()
        if not gone and moment(request, engine.manager.rule):
            held = engine.n_held
            engine.llm.llm_engine.abort_request([victim])
            gone, returned = True, held - engine.n_held
    assert gone, "the moment never came"
    assert set(finished) == set(asked)
    return [finished[name] for name in asked], returned


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancelling_gives_all_blocks_back_and_disturbs_no_one(engine, moment):
    small = engine(CLUSTERED, **IN_PIECES)
    undisturbed = small.generate([*PROMPTS, VICTIM], N_NEW)
    tokens, returned = generate_and_cancel(small, moment)
    assert tokens == undisturbed[:2]
    assert returned > 0
    assert small.n_held == 0
    assert small.generate([*PROMPTS, VICTIM], N_NEW) == undisturbed


def test_a_cancelled_prompt_held_its_holes_until_it_was_clustered(engine):
    """The moments are what they are called: blocks of the whole prompt before, of what is kept of it after."""
    small = engine(CLUSTERED, **IN_PIECES)
    assert generate_and_cancel(small, is_clustered_but_not_freed)[1] == -(-len(VICTIM) // PAGE)
    rule = small.manager.rule
    n_tokens = len(VICTIM) + 5
    kept = rule.kept_pages(n_tokens, rule.n_chunks(n_tokens, len(VICTIM)))
    assert generate_and_cancel(small, is_generating)[1] == len(kept)


def test_a_block_that_is_not_given_back_would_be_seen(engine, monkeypatch):
    small = engine(CLUSTERED, **IN_PIECES)
    free, kept = small.manager.free, []
    with monkeypatch.context() as patch:
        patch.setattr(small.manager, "free", kept.append)
        asked = small.ask(VICTIM, N_NEW)
        small.step()
        small.llm.llm_engine.abort_request([asked])
        assert small.n_held > 0
    for request in kept:
        free(request)
    assert small.n_held == 0


def process_of(server, title):
    """The one process of a server whose title begins so."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = (process for process in below if " ".join(process.cmdline()).startswith(title))
    return found


async def ask_and_kill(server, title):
    """What clients get when a process of the server is killed as the first of them hears a token."""
    victim = process_of(server, title)

    def kill():
        with contextlib.suppress(psutil.NoSuchProcess):  # of two that heard one, the second
            victim.kill()

    async with client_of(server) as client:
        asked = (streamed(client, prompt, 600, on_token=kill) for prompt in PROMPTS * 4)
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=60)


async def ask(server):
    async with client_of(server) as client:
        return [await streamed(client, prompt, N_NEW) for prompt in PROMPTS]


def test_a_killed_process_is_told_to_clients_and_a_new_server_works(engine, tmp_path):
    """By the server: the `LLM` of vLLM 0.32 was seen to wait for ever for an engine core that was killed."""
    expected = engine(CLUSTERED).generate(PROMPTS, N_NEW)
    folder = model_with_tokenizer(tmp_path / "served")
    for title in ("VLLM::EngineCore", "VLLM::Worker"):
        with served(folder, CLUSTERED) as server:
            assert asyncio.run(ask(server)) == expected
            told = asyncio.run(ask_and_kill(server, title))
            assert all(isinstance(answer, openai.APIError) for answer in told), told
            with pytest.raises(openai.APIError):
                asyncio.run(ask(server))
            assert server.process.wait(timeout=60) is not None  # it ends, so that who watches it can start another
    with served(folder, CLUSTERED) as server:
        assert asyncio.run(ask(server)) == expected
