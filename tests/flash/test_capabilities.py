"""Which backends work, on made-up machines of all kinds and on this one."""

import re
import sys
from dataclasses import replace

import pytest
import torch

from cggr_flash import attention_backends
from cggr_flash.__main__ import main
from cggr_flash.capabilities import HUB_KERNELS, ORDER, backend_row, backend_rows, check_backend
from cggr_flash.machine import inspect_machine
from tests.support.machines import A100, ALL_PACKAGES, CPU, H200, RADEON, V100

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")


def without(package: str, machine=H200):
    return replace(machine, packages={name: v for name, v in ALL_PACKAGES.items() if name != package})


def working(machine) -> set[str]:
    return {row.name for row in backend_rows(machine) if row.available}


def test_everything_works_where_everything_is_there():
    assert working(H200) >= {*ORDER, "sdpa/cudnn", "sdpa/flash", "sdpa/memory-efficient", "sdpa/math"}
    assert all(row.reason and not row.fix for row in backend_rows(H200))


def test_rows_are_in_the_order_of_auto_with_the_kernels_of_sdpa_behind_it():
    names = [row.name for row in backend_rows(CPU)]
    assert [name for name in names if not name.startswith("sdpa/")] == list(ORDER)
    assert names[names.index("sdpa") + 1 :][:4] == ["sdpa/cudnn", "sdpa/flash", "sdpa/memory-efficient", "sdpa/math"]


@pytest.mark.parametrize(
    ("machine", "backend", "reason", "fix"),
    [
        (CPU, "flash_attention_2", "needs an NVIDIA GPU, but the device is cpu", "device_map='cuda'"),
        (CPU, "kernels-community/flash-attn2", "needs an NVIDIA GPU, but the device is cpu", "device_map='cuda'"),
        (RADEON, "flash_attention_3", "needs an NVIDIA GPU, but the device is cuda:0 (AMD Instinct", "'sdpa'"),
        (CPU, "flex_attention", "its backward pass needs a GPU, but the device is cpu", "'sdpa'"),
        (
            V100,
            "flash_attention_2",
            "needs compute capability 8.0 (Ampere) or later, but Tesla V100 has 7.0",
            "use backend='sdpa'",
        ),
        (
            A100,
            "flash_attention_3",
            "needs compute capability 9.0 (Hopper) or later, but NVIDIA A100 has 8.0",
            "use backend='sdpa'",
        ),
        (A100, "kernels-community/flash-attn4", "needs compute capability 9.0 (Hopper) or later", "backend='sdpa'"),
        (
            replace(H200, dtype=torch.float32),
            "flash_attention_4",
            "supports float16 and bfloat16 only, but the model is in float32",
            "dtype=torch.bfloat16",
        ),
        (
            without("flash-attn-4"),
            "flash_attention_4",
            "package flash-attn-4 is not installed",
            "'flash-attn-4>=4.0.0b18'",
        ),
        (without("flash-attn-3"), "flash_attention_3", "package flash-attn-3 is not installed", "on no package regis"),
        (
            without("flash-attn"),
            "flash_attention_2",
            "package flash-attn is not installed",
            "--no-build-isolation 'flash-attn>=2.8'",
        ),
        (
            replace(H200, packages={**ALL_PACKAGES, "flash-attn": "2.3.1"}),
            "flash_attention_2",
            "flash-attn 2.3.3 or later is required, but 2.3.1 is installed",
            "flash-attn>=2.8",
        ),
        (
            replace(H200, import_errors={"flash-attn": "ImportError: undefined symbol: _ZN3c10"}),
            "flash_attention_2",
            "flash-attn 2.8.3 cannot be imported: ImportError: undefined symbol: _ZN3c10",
            "reinstall it for torch",
        ),
        (without("kernels"), "owner/kernel", "the package kernels is not installed", "'transformers[kernels]'"),
        (
            replace(H200, packages={**ALL_PACKAGES, "kernels": "2.0"}),
            "kernels-community/flash-attn2",
            "this transformers requires kernels >= 1.0, < 2.0, but 2.0 is installed",
            "'transformers[kernels]'",
        ),
        (
            replace(H200, packages={**ALL_PACKAGES, "kernels": "0.9"}),
            "kernels-community/flash-attn2",
            "this transformers requires kernels >= 1.0, < 2.0, but 0.9 is installed",
            "'transformers[kernels]'",
        ),
        (
            replace(H200, import_errors={"kernels": "ImportError: cannot import name 'x'"}),
            "kernels-community/flash-attn2",
            "kernels 1.5 cannot be imported: ImportError: cannot import name 'x'",
            "'transformers[kernels]'",
        ),
        (without("triton"), "flex_attention", "it is compiled by triton, which is not installed", "CUDA build"),
        (
            replace(H200, sdpa_kernels=dict.fromkeys(H200.sdpa_kernels, "no")),
            "sdpa",
            "none of its kernels run on cuda:0 (NVIDIA H200) in bfloat16",
            "use backend='eager'",
        ),
    ],
)
def test_the_reason_is_exact_and_the_fix_is_named(machine, backend, reason, fix):
    row = backend_row(backend, machine)
    assert not row.available
    assert reason in row.reason
    assert fix in row.fix


def test_flash_attention_2_may_be_a_build_for_amd():
    assert backend_row("flash_attention_2", RADEON).available


def test_hub_kernels_stand_for_the_three_libraries():
    assert set(HUB_KERNELS.values()) == set(FLASH)
    assert all("/" in name for name in HUB_KERNELS)


def test_this_machine():
    rows = {row.name: row for row in attention_backends("cpu", torch.float32)}
    assert rows["sdpa"].available
    assert rows["sdpa/flash"].available
    assert rows["sdpa/math"].available
    assert not rows["sdpa/cudnn"].available
    assert rows["sdpa/cudnn"].reason == "needs CUDA, but the device is the CPU"
    assert rows["eager"].available
    assert not any(rows[name].available for name in FLASH)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(RuntimeError, match=r"device cuda does not exist: this PyTorch \(.*\) sees no GPU; use 'cpu'"):
        attention_backends("cuda")


def test_a_gpu_beyond_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"device cuda:2 does not exist: .* sees 2 GPUs; use 'cuda:1' or 'cpu'"):
        attention_backends("cuda:2")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", 1.5])
def test_what_is_no_device(device, capsys):
    message = re.escape(f"device must be a torch device or the name of one ('cpu', 'cuda', 'cuda:1'), got {device!r}")
    with pytest.raises(ValueError, match=message):
        attention_backends(device)
    with pytest.raises(SystemExit) as ended:
        main(["--device", str(device)])
    assert ended.value.code == 2
    assert "error: device must be a torch device" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, None])
def test_what_is_no_dtype_of_attention(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating torch dtype such as"):
        attention_backends("cpu", dtype)


def test_a_dtype_that_no_kernel_of_sdpa_has_is_seen_by_running_them():
    row = {row.name: row for row in attention_backends("cpu", torch.float8_e4m3fn)}["sdpa"]
    assert (row.available, row.fix) == (False, "use backend='eager'")


def test_looking_leaves_the_random_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attention_backends("cpu")
    assert torch.equal(torch.rand(3), expected)


def test_an_installed_package_that_does_not_import_says_its_own_error(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN2at')\n")
    (tmp_path / "flash_attn_3-3.0.0b1.dist-info").mkdir()
    (tmp_path / "flash_attn_3-3.0.0b1.dist-info" / "METADATA").write_text("Name: flash-attn-3\nVersion: 3.0.0b1\n")
    from cggr_flash import machine

    assert machine._version("flash-attn-3") == "3.0.0b1"
    assert machine._import_error("flash_attn_interface") == "ImportError: undefined symbol: _ZN2at"
    found = inspect_machine(torch.device("cpu"), torch.bfloat16)
    assert found.packages["flash-attn-3"] == "3.0.0b1"
    assert "flash_attn_interface" not in sys.modules


def test_the_table_has_every_row_with_its_reason(capsys):
    main(["--device", "cpu", "--dtype", "float32"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"cpu, float32, torch {torch.__version__}, transformers ")
    assert lines[0].split() == ["backend", "works", "reason", "fix"]
    for row, line in zip(attention_backends("cpu", torch.float32), lines[1:], strict=True):
        assert line.startswith(row.name)
        assert row.reason in line
        assert line.endswith(row.fix)


@pytest.mark.parametrize("name", ["auto", *ORDER, "owner/kernel", "owner/kernel@v1.2", "owner/kernel@main:function"])
def test_names_that_exist(name):
    assert check_backend(name) == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("flash_attn_2", "flash_attention_2"), ("spda", "sdpa"), ("FlashAttention4", "flash_attention_4")],
)
def test_an_unknown_name_gets_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"backend must be one of .*got {name!r}; did you mean {nearest!r}\?"):
        check_backend(name)


@pytest.mark.parametrize("name", ["", "sdpa/", "quantum", "a/b/c"])
def test_a_name_that_is_like_none(name):
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'flash_attention_4'"):
        check_backend(name)


def test_a_backend_is_a_string():
    with pytest.raises(TypeError, match="backend must be a string, got 2 of type int"):
        check_backend(2)
