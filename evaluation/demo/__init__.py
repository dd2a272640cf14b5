"""The demo: a real Llama on a clustered cache, beside its full cache and checked by the reference."""
