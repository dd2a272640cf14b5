"""What plain torch, Triton kernels and C++ share: the canonical arithmetic, and the steps that decide by it."""
