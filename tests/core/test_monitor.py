import copy
import pickle

import torch

from cggr_core.monitor import Monitor


def test_cpu_values_are_there_at_once_and_read_once():
    monitor = Monitor()
    assert monitor.read() is None
    monitor.post(torch.tensor([1, 2]))
    assert monitor.read() == [1.0, 2.0]
    assert monitor.read() is None


def test_the_newest_value_counts():
    monitor = Monitor()
    monitor.post(torch.tensor([1.0]))
    monitor.post(torch.tensor([2.0]))
    assert monitor.read(wait=True) == [2.0]


class Event:
    device = torch.device("cpu")

    def __init__(self):
        self.done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def test_pending_values_are_read_when_their_copy_is_done():
    # What a device does, without one: copies that finish in order, later.
    monitor = Monitor()
    first, second = Event(), Event()
    monitor._pending = [(torch.tensor([1.0]), first), (torch.tensor([2.0]), second)]
    assert monitor.read() is None
    first.done = True
    assert monitor.read() == [1.0]
    assert monitor.read() is None
    assert monitor.read(wait=True) == [2.0]
    assert len(monitor._spare) == 2


def test_copies_start_empty():
    monitor = Monitor()
    monitor._pending = [(torch.tensor([1.0]), Event())]
    assert copy.deepcopy(monitor).read(wait=True) is None
    assert pickle.loads(pickle.dumps(monitor)).read() is None


def test_nothing_is_posted_inside_of_a_compiled_function():
    monitor = Monitor()

    def step(x):
        monitor.post(x)
        return x + 1

    torch.compile(step, fullgraph=True, backend="aot_eager")(torch.ones(1))
    assert monitor.read() is None
