"""The server of `kvcluster serve-demo` answers nobody else: a socket of its own, and a key. Without vLLM."""

import asyncio
import contextlib
import io
import os
import stat
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from kvcluster.evaluation.serving.run import watched
from kvcluster.evaluation.serving.server import URL, Server, ServerFailedError

FAKE = '''
"""As vLLM's server: it binds the socket of --uds, and what is below /v1 asks for VLLM_API_KEY."""
import http.server, os, socketserver, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        is_right = self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.send_response(200 if is_right or not self.path.startswith("/v1") else 401)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 3.0\\n")

    def address_string(self):
        return "socket"

socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Answer).serve_forever()
'''


class FakeServer(Server):
    """`Server` with another program in the place of vLLM's."""

    def __init__(self, folder, program=FAKE, **options):
        super().__init__(folder, None, n_blocks=10, **options)
        (folder / "fake.py").write_text(program)
        self.command = [sys.executable, str(folder / "fake.py"), *self.command[self.command.index("--model") :]]


def asked(server, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(transport=httpx.HTTPTransport(uds=server.socket), base_url=URL) as client:
        return client.get("/v1/models", headers=headers).status_code


def test_a_server_answers_to_its_own_key_alone(tmp_path):
    with FakeServer(tmp_path) as server, FakeServer(tmp_path) as other:
        assert [asked(server, key) for key in (server.key, other.key, None)] == [200, 401, 401]
        assert len(server.key) > 40
        assert not any(server.key in word for word in server.command)  # which everybody on the machine may read
        assert server.get("/v1/models")
        assert server.metrics()["running"] == 3


def test_nobody_else_can_be_in_the_place_of_a_server(tmp_path):
    """No port is chosen, so none can be taken: the socket's folder is this user's alone."""
    with FakeServer(tmp_path) as server:
        folder = Path(server.socket).parent.stat()
        assert (stat.S_IMODE(folder.st_mode), folder.st_uid) == (0o700, os.getuid())
        assert stat.S_ISSOCK(Path(server.socket).stat().st_mode)
        assert not {"--host", "--port"} & set(server.command)


def test_a_server_that_is_gone_is_said_and_leaves_nothing(tmp_path):
    with FakeServer(tmp_path) as server:
        server.process.kill()
        server.process.wait()
        with pytest.raises(ServerFailedError, match="the server must answer while it is asked, got"):
            server.metrics()
    assert not Path(server.socket).parent.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", "^the server ended with status 3$"),
        ("raise ValueError('no such model')", "^ValueError: no such model$"),
        ("import time; time.sleep(60)", "^the server must answer within 1 seconds, got none$"),
    ],
)
def test_a_server_that_does_not_come_up_is_said_and_leaves_nothing(tmp_path, program, message):
    server = FakeServer(tmp_path, program, patience=1.0)
    with pytest.raises(ServerFailedError, match=message):
        server.__enter__()
    assert server.process.returncode is not None
    assert not Path(server.socket).parent.exists()


class Silent:
    """A server that takes questions and never answers."""

    def metrics(self):
        return {"running": 1, "waiting": 0, "preemptions": 0, "generated": 0, "used": 0}

    def n_held(self, metrics):
        return 1

    @contextlib.asynccontextmanager
    async def client(self):
        await asyncio.sleep(60)
        yield


def test_conversations_end_with_who_watches_them():
    """So that Ctrl-C is one line: asyncio would print a traceback of each that was left."""

    async def interrupted():
        watching = asyncio.create_task(watched(Silent(), ["a", "b"], 5, "stock", Console(file=io.StringIO())))
        await asyncio.sleep(0.3)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return len(asyncio.all_tasks())

    assert asyncio.run(interrupted()) == 1
