"""Every operation in plain torch, on any device; certified where a cheap filter can be."""
