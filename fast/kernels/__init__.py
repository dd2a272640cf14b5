"""Triton kernels, one a file, each with its launcher. Imported only when the backend `triton` is used."""
