"""Kernels of the select op."""
