"""What works with ``cggr[flash]`` alone: save a tiny model, load it with the best attention backend, and train a step.

Run by ``nox -s alone`` with the Python of an environment that has only ``cggr[flash]`` and its dependencies; also on
machines without CUDA.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cggr import CGGRModel, load_model_with_flash_attention
from cggr_flash import attention_backends


def main() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = torch.arange(6, 38).reshape(2, 16)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).save_pretrained(folder)
        model = load_model_with_flash_attention(folder)
    loss = CGGRModel(model, min_tokens_ratio=0.25).train()(tokens, labels=tokens)
    loss.backward()
    if not torch.isfinite(loss):
        raise SystemExit(f"a step on the loaded model gave the loss {loss}")
    why = {row.name: row.reason for row in attention_backends("cpu")}["sdpa"]
    print(f"cggr[flash]: a model loaded and trained on {model.config._attn_implementation!r} ({why})")


if __name__ == "__main__":
    main()
