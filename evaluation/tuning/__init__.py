"""Tuning to one model: which KV heads look far back, so that they should keep every token."""
