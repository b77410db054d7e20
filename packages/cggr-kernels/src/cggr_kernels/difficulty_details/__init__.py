"""Kernels of the difficulty op."""
