"""Kernels of the linear cross-entropy op."""
