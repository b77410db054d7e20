"""Models whose loss a test gives."""

import torch
import transformers
from torch.nn.functional import cross_entropy

from tests.support.tiny_models import ROUTABLE, VOCAB


def batch(rows=4, length=48):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def nll(logits, labels, **options):
    """Loss of every label ``[B, S - 1]``, 0 where nothing is counted."""
    return cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", **options)


def counted(labels):
    return labels[:, 1:] != -100


def mean(logits, labels):
    return nll(logits, labels).sum() / counted(labels).sum()


def model_with(own, *, kind="forward"):
    class OwnLoss(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
            if labels is not None:
                output.loss = own(output.logits, labels)
            return output

    made = ROUTABLE["llama"]()
    if kind == "forward":
        other = OwnLoss(made.config)
        other.load_state_dict(made.state_dict())
        return other.train()
    made.loss_function = lambda logits, labels, vocab_size, **options: own(
        logits.view(*labels.shape, vocab_size), labels
    )
    return made
