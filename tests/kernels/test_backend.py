import subprocess
import sys

import pytest
import torch

from cggr_kernels.__main__ import main, rows
from cggr_kernels.backend import BACKEND, OPS, REASON


def test_offers_every_op_on_the_device_of_the_tests(device):
    assert REASON is None
    assert {op for op, device_type in BACKEND if device_type == device} == set(OPS)
    assert all(callable(function) for function in BACKEND.values())


def test_the_report_has_a_reason_for_every_row(capsys):
    assert len(rows()) == 3 * len(OPS)
    assert all(all(row) for row in rows())
    main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 3 * len(OPS)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("sys.modules['triton'] = None", "triton cannot be imported"),
        ("import torch; torch.version.hip = '7.0'", "built for ROCm"),
        ("import torch, os; torch.version.cuda = None; os.environ.pop('TRITON_INTERPRET', None)", "without CUDA"),
    ],
)
def test_imports_and_says_why_where_the_kernels_cannot_run(setup, reason):
    code = f"import sys; {setup}\nimport cggr_kernels\nassert not cggr_kernels.BACKEND\nprint(cggr_kernels.REASON)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert reason in done.stdout, done.stderr


def test_tensors_elsewhere_are_refused():
    from cggr_kernels.difficulty import difficulty

    with pytest.raises(ValueError, match="logits is on meta"):
        difficulty(torch.empty(2, 3, device="meta"))
