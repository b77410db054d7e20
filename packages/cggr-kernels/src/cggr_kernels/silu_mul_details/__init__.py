"""Kernels of the silu_mul op."""
