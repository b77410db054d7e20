"""Token-routed MLP layers: mixtures of experts that drop no token.

:func:`create_persistent_tr_mlp` creates one. On CUDA it runs in the persistent kernels of cggr-kernels, elsewhere in
plain torch with the same results. :func:`register_experts` lets transformers models run their experts there.
"""

from importlib.metadata import version

from cggr_moe.experts import register_experts
from cggr_moe.huggingface import from_hf_block, to_hf_block
from cggr_moe.layers import PersistentTRMLP, create_persistent_tr_mlp

__version__: str = version("cggr-moe")

__all__ = [
    "PersistentTRMLP",
    "create_persistent_tr_mlp",
    "from_hf_block",
    "register_experts",
    "to_hf_block",
    "__version__",
]
