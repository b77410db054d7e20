"""Kernels of the rotary op."""
