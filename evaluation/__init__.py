"""Measuring: what a compressed cache keeps, what it costs, and how sure that is. Nothing in `fast` imports it.

`models` and `texts` are what is measured on, `machine` and `timing` how, `runs` where it is kept, `statistics` what it
says, `report`, `pages` and `colours` how that is shown. `quality/` asks what a model still knows, `speed/` how fast it
is, `serving/` what a server of vLLM makes of it; `demo/` shows all at once and has the reference check it.
"""
