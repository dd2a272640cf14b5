"""The serving demo: vLLM's server, stock and with clustered pages, the same pool and the same clients."""
