import pytest
import torch

from cggr_flash import enabling, loading
from cggr_flash.machine import Machine


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_machine(monkeypatch):
    """Pretend to be on a machine: its facts replace the real ones."""

    def pretend(machine: Machine) -> None:
        for module in (enabling, loading):
            monkeypatch.setattr(module, "inspect_machine", lambda device, dtype: machine)

    return pretend
