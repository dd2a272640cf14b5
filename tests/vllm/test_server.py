"""The OpenAI-compatible server with clustered pages, in processes of its own, and a client that streams from it."""

import asyncio

import httpx
import pytest
from engines import CLUSTERED, PAGE
from servers import PROMPTS, client_of, is_idle, model_with_tokenizer, served, stream_of, streamed, wait_for

from kvcluster.evaluation.serving.server import NAME, URL, ServerFailedError

N_NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_with_tokenizer(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder):
    with served(folder, CLUSTERED) as running:
        yield running


def test_conversations_streamed_at_once_have_the_tokens_of_the_engine(server, engine):
    async def all_of_them():
        async with client_of(server) as client:
            return await asyncio.gather(*(streamed(client, prompt, N_NEW) for prompt in PROMPTS))

    before = server.metrics()["generated"]
    answers = asyncio.run(all_of_them())
    assert answers == engine(CLUSTERED).generate(PROMPTS, N_NEW)
    assert answers != engine().generate(PROMPTS, N_NEW)  # without clusters there are others
    metrics = wait_for(server, is_idle)
    assert metrics["generated"] - before == len(PROMPTS) * N_NEW
    assert metrics["preemptions"] == 0


def test_metrics_count_the_blocks_that_a_conversation_holds(server):
    """Of 600 tokens 4 chunks are clustered: 1 block of sinks, 4 of centroids, at least 2 of exact tokens."""

    async def watched(before):
        def is_seen(metrics):
            generated = metrics["generated"] - before
            return (metrics["running"] == 1 and generated > 4) or generated == 400

        async with client_of(server) as client, await stream_of(client, PROMPTS[2], 400) as stream:
            watching = asyncio.to_thread(wait_for, server, is_seen)
            return (await asyncio.gather(watching, anext(aiter(stream))))[0]

    for _ in range(5):  # on a busy machine it may be over before it is seen
        metrics = asyncio.run(watched(server.metrics()["generated"]))
        if metrics["running"] == 1:
            break
    assert metrics["running"] == 1
    assert 7 <= server.n_held(metrics) <= 12 < -(-600 // PAGE)
    wait_for(server, is_idle)


def test_blocks_come_back_from_a_client_that_goes_away(server):
    async def goes_away():
        async with client_of(server) as client, await stream_of(client, PROMPTS[0], 700) as stream:
            async for _ in stream:
                break

    before = server.metrics()["generated"]
    asyncio.run(goes_away())
    metrics = wait_for(server, is_idle)
    assert metrics["generated"] - before < 700  # it was not generated to its end


@pytest.mark.parametrize("authorization", ["Bearer none", None])
def test_the_server_answers_nobody_without_its_key(server, authorization):
    given = {} if authorization is None else {"Authorization": authorization}
    with httpx.Client(transport=httpx.HTTPTransport(uds=server.socket), base_url=URL) as client:
        assert client.get("/v1/models", headers=given).status_code == 401
    assert NAME in server.get("/v1/models")


def test_a_wrong_parameter_ends_the_server_with_a_line_that_names_it(folder):
    wrong = served(folder, CLUSTERED | {"chunk_size": 100})
    with pytest.raises(ServerFailedError, match=r"^ValueError: chunk_size must be a multiple .* got 100$"):
        wrong.__enter__()
