"""Separate processes for tests, forked from one that has imported everything."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "accelerate",
        "cggr_train.cli",
        "cggr_train.run",
        "cggr_train.study",
        "cggr_train.trainer",
        "tests.support.commands",
        "tests.support.tiny_models",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)
