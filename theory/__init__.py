"""Numbered claims: prose with proofs (`*/README.md`) beside the code that tries to break them (`*/*.py`).

`python -m kvcluster.theory` prints every claim with its check and verdict; `--claim M5` runs one, `--figures DIR` draws
the figures. Claims E1 to E9 and measured times need torch, the partition's optima, its pooled cut and its rounds SciPy,
the figures matplotlib, and whatever is said of SmolLM2 needs that model, or another one that `--model` names; what is
missing is named, and the command then ends with 2.

| folder | claims | modules |
|---|---|---|
| `complexity` | C1 to C8 | `checks`, `closed_forms`, `counting`, `pooled` |
| `partition` | P1 to P12 | `checks`, `stationary`, `optimal`, `convexity`, `pooled`, `rounds` |
| `merging` | M1 to M5 | `checks`, `certificate`, `certified`, `rounding` |
| `exactness` | E1 to E9 | `checks`, `recalling` |
| `recall` | R1 to R4 | `checks` |

`notation.md` says what the signs mean, and bounds the rounding of attention (N1). `claims` says what a claim is,
`catalogue` lists them, `figures` draws, `real_cache` reads the keys of a real model.
"""
