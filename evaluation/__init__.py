"""Measurements: what a compressed cache keeps, what it costs, and how sure that is. Nothing in `fast` imports this.

`models` and `texts` are what is measured on; `machine` and `timing` help to measure, `runs` keeps the results,
`statistics` evaluates them, `report`, `pages` and `colours` show them; `errors`, `places` and `commands` say how a
command refuses what it is given, where it writes, and how it ends. `quality/` asks what a model still knows, `speed/`
how fast it is, `tuning/` which of its heads should keep everything, `serving/` what a server of vLLM makes of it;
`demo/` shows all at once and has the reference check it.
"""
