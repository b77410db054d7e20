"""Made-up machines for tests: the facts are invented, the code that judges them is real."""

from dataclasses import replace

import torch

from cggr_flash.machine import MODULES, SDPA_KERNELS, Machine

ALL_PACKAGES = {
    "flash-attn": "2.8.3",
    "flash-attn-3": "3.0.0b1",
    "flash-attn-4": "4.0.0b18",
    "kernels": "1.5",
    "triton": "3.6.0",
}
assert ALL_PACKAGES.keys() == MODULES.keys()

H200 = Machine(
    device=torch.device("cuda:0"),
    device_name="NVIDIA H200",
    capability=(9, 0),
    dtype=torch.bfloat16,
    packages=ALL_PACKAGES,
    import_errors={},
    sdpa_kernels=dict.fromkeys(SDPA_KERNELS, ""),
    kernels_versions=("1.0", "2.0"),
)
A100 = replace(H200, device_name="NVIDIA A100", capability=(8, 0))
V100 = replace(H200, device_name="Tesla V100", capability=(7, 0))
RADEON = replace(H200, device_name="AMD Instinct MI300X", capability=None)
CPU = replace(
    H200,
    device=torch.device("cpu"),
    device_name="cpu",
    capability=None,
    sdpa_kernels={"cudnn": "CUDA", "flash": "", "memory-efficient": "CUDA", "math": ""},
)
