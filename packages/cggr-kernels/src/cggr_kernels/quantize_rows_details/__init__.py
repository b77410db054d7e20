"""Kernels of the quantize_rows and quantize_silu_mul ops."""
