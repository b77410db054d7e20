"""Kernels of the routed attention op."""
