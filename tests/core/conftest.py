import pytest
import torch
from hypothesis import settings

# A loaded machine is no failure.
settings.register_profile("cggr", deadline=None)
settings.load_profile("cggr")


@pytest.fixture(autouse=True)
def _same_numbers_everywhere():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
