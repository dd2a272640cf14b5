"""vLLM's OpenAI-compatible server as a process of its own, for nobody else, and what its metrics say.

It listens on a Unix socket in a folder that only this user may enter, not on a port: one that is free when it is looked
for may be another's when the server binds it, who would then be asked, and told the key.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx

__all__ = ["NAME", "Server", "ServerFailedError"]

NAME = "model"  # what clients call the model
URL = "http://kvcluster"  # for clients that want one; the socket is all that is connected to
# Both cores compute, nothing is fetched, and vLLM reports its use to nobody.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "used": "vllm:kv_cache_usage_perc",  # a share, 0 to 1, whatever its name says
    "preemptions": "vllm:num_preemptions_total",
    "generated": "vllm:generation_tokens_total",
}


class ServerFailedError(Exception):
    """The server did not start, ended or answers no more; the message is the line that says why."""


class Server:
    """`vllm serve` for the duration of a `with` block, in which it answers.

    Parameters
    ----------
    model : folder of a model.
    kvcluster : the plugin's parameters; None leaves vLLM as it is.
    n_blocks : blocks of its pool, each of `page` tokens.
    options : more options of the server, without their two dashes, such as `{"dtype": "bfloat16"}`.
    patience : seconds to wait for it to come up.

    Attributes
    ----------
    key : what a client must send; new for every server, and known to the environment of its process alone.

    Raises
    ------
    ServerFailedError : it ended before it answered, or did not answer in time.

    Notes
    -----
    It is started as `python -m vllm.entrypoints.openai.api_server`, the same server: in the package vllm-cpu 0.32 the
    command `vllm` itself ends at once, since it asks for the version of a package named `vllm`.
    """

    def __init__(
        self,
        model: Path,
        kvcluster: Mapping[str, Any] | None,
        *,
        n_blocks: int,
        page: int = 32,
        options: Mapping[str, Any] | None = None,
        patience: float = 300.0,
    ) -> None:
        self.n_blocks, self.patience, self.key = n_blocks, patience, secrets.token_urlsafe()
        self.folder = tempfile.TemporaryDirectory(prefix="kvcluster-")
        self.socket = str(Path(self.folder.name, "socket"))
        asked = {
            **{"model": model, "served-model-name": NAME, "uds": self.socket, "block-size": page},
            **{"num-gpu-blocks-override": n_blocks, "kv-cache-memory-bytes": 2**30, "gpu-memory-utilization": 0.1},
            **(options or {}),
        }
        self.command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        self.command += [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        self.command += ["--enforce-eager", "--no-enable-prefix-caching"]
        if kvcluster is not None:
            self.command += ["--additional-config", json.dumps({"kvcluster": kvcluster})]

    def __enter__(self) -> Self:
        self.log = tempfile.TemporaryFile(mode="w+")
        environment = {name: value for name, value in os.environ.items() if name != "KVCLUSTER_VLLM"}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment | ENVIRONMENT | {"VLLM_API_KEY": self.key},  # where other users cannot read it
            start_new_session=True,
        )
        try:
            self.wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_it_answers(self) -> None:
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ServerFailedError(self.reason())
            try:
                self.get("/health")
            except httpx.HTTPError:  # it does not listen yet
                time.sleep(0.2)
            else:
                return
        raise ServerFailedError(f"the server must answer within {self.patience:.0f} seconds, got none")

    def get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.socket), base_url=URL, timeout=30) as client:
            return client.get(path, headers=headers).raise_for_status().text

    def client(self, timeout: float = 600.0) -> Any:
        """An `openai.AsyncOpenAI` that talks to this server alone."""
        import openai

        over_socket = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=self.socket))
        return openai.AsyncOpenAI(
            base_url=f"{URL}/v1", api_key=self.key, max_retries=0, timeout=timeout, http_client=over_socket
        )

    def metrics(self) -> dict[str, float]:
        """Requests running and waiting, the share of the pool that is used, preemptions and tokens so far.

        Raises
        ------
        ServerFailedError : it does not answer any more.
        """
        try:
            lines = [line for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        except httpx.HTTPError as error:
            raise ServerFailedError(f"the server must answer while it is asked, got: {error}") from error
        return {
            name: sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(metric + r"[{ ]", line))
            for name, metric in METRICS.items()
        }

    def n_held(self, metrics: Mapping[str, float]) -> int:
        """Blocks that requests hold; one block of the pool is never given away."""
        return round(metrics["used"] * (self.n_blocks - 1))

    def reason(self) -> str:
        """The first error in what the server wrote."""
        self.log.seek(0)
        text = self.log.read()
        errors = re.findall(r"^(?:\(.*?\) )?(?:ERROR [^]]*\] )?(?:\w+\.)*(\w*(?:Error|Exception): .*)$", text, re.M)
        return errors[0] if errors else f"the server ended with status {self.process.returncode}"

    def stop(self) -> None:
        """End the server and all its processes."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # children that it may have left
        self.process.wait()
        self.log.close()
        self.folder.cleanup()
