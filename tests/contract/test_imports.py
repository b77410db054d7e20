"""Which modules may import what, read from the source: rules that import-linter has no words for."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"

# What each package may import besides the standard library and itself.
ALLOWED = {
    "cggr_core": {"torch", "transformers"},  # transformers: routing/ alone, see below
    "cggr_kernels": {"torch", "triton"},
    "cggr_flash": {"torch", "transformers"},
    "cggr_moe": {"torch", "cggr_core"},
    "cggr": {"cggr_core"},
}


def sources(package: str) -> list[Path]:
    folder = PACKAGES / package.replace("_", "-") / "src" / package
    found = sorted(folder.rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


def imports(tree: ast.AST, *, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Top-level names that a module imports, the line, and whether only a call reaches the import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno, in_function
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from ((name, line, True) for name, line, _ in imports(node))
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, in_function=in_function or function)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_requires(package):
    accepted = ALLOWED[package] | {package} | sys.stdlib_module_names
    strangers = [
        f"{path.relative_to(PACKAGES)}:{line} imports {name}"
        for path in sources(package)
        for name, line, _ in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name not in accepted
    ]
    assert not strangers


def test_core_imports_transformers_in_routing_alone_and_lazily():
    wrong = [
        f"{path.relative_to(PACKAGES)}:{line}"
        for path in sources("cggr_core")
        for name, line, in_function in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name == "transformers" and not (in_function and "routing" in path.parts)
    ]
    assert not wrong, f"transformers is imported inside a function of cggr_core/routing, not at {wrong}"


def test_the_reader_of_imports_sees_each_form():
    source = """
import torch.nn
from . import own
if TYPE_CHECKING:
    import transformers
def f():
    from triton.language import exp
class C:
    import numpy
"""
    found = [(name, lazy) for name, _, lazy in imports(ast.parse(source))]
    assert found == [("torch", False), ("transformers", True), ("triton", True), ("numpy", False)]
