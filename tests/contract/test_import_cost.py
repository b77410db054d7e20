"""What `import cggr` and the Trainer load beside torch and transformers: the seconds before a user's first line."""

import json
import subprocess
import sys

import torch

SCRIPT = """
import importlib, json, sys
loaded = []
for module, name in (
    ("cggr_train.cli", None),
    ("torch", None),
    ("cggr", None),
    ("transformers", "Trainer"),
    ("cggr_train", "CGGRTrainer"),
):
    before = set(sys.modules)
    found = importlib.import_module(module)
    if name is not None:
        getattr(found, name)
    loaded.append(sorted(set(sys.modules) - before))
print(json.dumps(loaded))
"""


def test_imports_load_nothing_that_a_first_step_does_not_need():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    command, _, cggr, _, trainer = json.loads(done.stdout)

    def foreign(names: list[str]) -> set[str]:
        own = ("cggr", "cggr_core", "cggr_kernels", "cggr_train")
        return {name.partition(".")[0] for name in names} - {*own, *sys.stdlib_module_names}

    assert "cggr_train.cli" in command and "cggr_core" in cggr and "cggr_train.trainer.mixin" in trainer
    # The command sets what OpenMP reads when torch is loaded, and its help must not wait for torch.
    assert not {"torch", "transformers", "matplotlib", "numpy"} & foreign(command)
    assert foreign(cggr) <= ({"triton"} if torch.version.cuda else set())
    assert not foreign(trainer)
    assert not [name for name in cggr + trainer if name.startswith(("cggr_core.routing", "cggr_train.study"))]
