"""Three steps in ``kv`` in the current environment, and the loss at ratio 1 compared with plain transformers.

Run with the Python of an environment installed as in the README; see ``nox -s fresh``.
"""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from cggr import CGGRModel, create_truncated_router

LEARNING_RATE = 0.1


def plain_losses(model: LlamaForCausalLM, batches: list[torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for input_ids in batches:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def routed_losses(model: LlamaForCausalLM, batches: list[torch.Tensor], ratio: float, router: bool) -> list[float]:
    scores = create_truncated_router(model, num_layers=1) if router else None
    wrapped = CGGRModel(model, scores, gradient="kv", min_tokens_ratio=ratio).train()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE)
    losses = []
    for input_ids in batches:
        loss = wrapped(input_ids, labels=input_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    batches = [torch.randint(0, 128, (4, 32)) for _ in range(3)]
    wanted = plain_losses(copy.deepcopy(model), batches)
    for router in (False, True):
        found = routed_losses(copy.deepcopy(model), batches, 1.0, router)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0.0)
        kept = routed_losses(copy.deepcopy(model), batches, 0.25, router)
        # The weights make it an estimate of the full loss: near it at the start, and another number.
        if not all(abs(a - b) < 0.2 for a, b in zip(kept, wanted, strict=True)) or kept == wanted:
            raise SystemExit(f"three steps at ratio 0.25 gave {kept}, near {wanted} was expected")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}: losses {wanted}, at ratio 1 the same")


if __name__ == "__main__":
    main()
