"""Kernels of the ops ``moe_route`` and ``moe_experts``; host code is in the modules of those names."""
