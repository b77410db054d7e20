"""Which modules may import what, read from the source: rules that import-linter cannot express."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"

# What each package may import besides the standard library and itself.
ALLOWED = {
    "cggr_core": {"torch", "transformers"},  # transformers: routing/ alone, see below
    "cggr_kernels": {"torch", "triton"},
    "cggr_flash": {"torch", "transformers", "safetensors"},
    "cggr_moe": {"torch", "cggr_core"},
    "cggr": {"cggr_core"},
}


def sources(package: str) -> list[Path]:
    folder = PACKAGES / package.replace("_", "-") / "src" / package
    found = sorted(folder.rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


def imports(tree: ast.AST, *, depth: int = 1, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Names that a module imports, cut to ``depth`` parts; the line; and whether the import is inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((cut(alias.name, depth), node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from package import module` may name a module, so what is imported counts as a part of the name.
            yield from ((cut(f"{node.module}.{alias.name}", depth), node.lineno, in_function) for alias in node.names)
        else:
            waits = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            waits |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports(node, depth=depth, in_function=in_function or waits)


def cut(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


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


def test_core_imports_transformers_in_routing_alone_and_routing_when_it_is_needed():
    wrong = []
    for path in sources("cggr_core"):
        if "routing" not in path.relative_to(PACKAGES).parts:
            for name, line, in_function in imports(ast.parse(path.read_text(encoding="utf-8")), depth=2):
                if name.startswith("transformers") or (name == "cggr_core.routing" and not in_function):
                    wrong.append(f"{path.relative_to(PACKAGES)}:{line} imports {name}")
    assert not wrong, "transformers is for cggr_core/routing, and routing is imported inside functions"


def test_no_test_imports_a_test():
    """Code shared by tests is in tests/support, and imported by its full name."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {(name, line) for name, line, _ in imports(tree, depth=3)}
        named |= {
            ("." * node.level, node.lineno)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        }
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for name, line in sorted(named)
            if name.startswith(("tests", ".")) and name.split(".")[1:2] != ["support"]
        ]
    assert not wrong
    shared = [path.stem for path in (ROOT / "tests" / "support").rglob("*.py")]
    assert len(shared) > 10 and not [name for name in shared if name.startswith("test_")]


# What packages other than core may import of it; the docstring of cggr_core.routing says so to people.
OF_CORE = {
    "backends", "checks", "experimental", "logprobs", "monitor", "recording", "routing", "settings", "step",
    "stopwatch",
}  # fmt: skip


READERS = {name: sources(name) for name in ("cggr", "cggr_moe", "cggr_train")} | {
    "benchmarks": sorted((ROOT / "benchmarks").glob("*.py"))
}


def exported(*inside: str) -> set[str]:
    """The names in ``__all__`` of a module of core, read from its source; empty if there is no such list."""
    folder = (PACKAGES / "cggr-core/src/cggr_core").joinpath(*inside)
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize("reader", READERS)
def test_the_public_part_of_core_is_all_that_others_import(reader):
    """Unlisted modules are private to core, and so are names that a listed module does not export."""
    wrong, found = [], 0
    for path in READERS[reader]:
        for name, line, _ in imports(ast.parse(path.read_text(encoding="utf-8")), depth=4):
            package, *inside = name.split(".")
            if package == "cggr_core" and inside:
                found += 1
                public = exported(*inside[:-1]) | (set() if inside[:-1] else OF_CORE)
                if len(inside) > 2 or (inside[:-1] and inside[0] not in OF_CORE) or inside[-1] not in public:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert found and not wrong


# Names of other libraries that have no public counterpart.
FOREIGN = {
    "_asdict",  # a public method of named tuples
    "_sleep",  # keeps a device busy while calls are queued
    "_experts_implementation",  # of a single block: set_experts_implementation is for whole models
    "_attn_implementation",  # of a config, which has no other way to be asked
    "_get_per_token_logps_and_entropies",  # what a trainer of TRL calls before its step
}


def test_benchmarks_use_public_names():
    wrong, modules = [], [path.stem for path in READERS["benchmarks"]]
    for path in READERS["benchmarks"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                name = node.attr
            elif isinstance(node, ast.alias):
                name = next((part for part in node.name.split(".") if part.startswith("_")), "")
            else:
                continue
            private = name.startswith("_") and not name.endswith("__")
            if private and name not in FOREIGN and name not in modules:
                wrong.append(f"{path.name}:{node.lineno} uses {name}")
    assert not wrong


def test_the_public_part_of_core_is_written_down():
    routing = next(path for path in sources("cggr_core") if path.parts[-2:] == ("routing", "__init__.py"))
    docstring = ast.get_docstring(ast.parse(routing.read_text(encoding="utf-8"))) or ""
    exported = ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", routing.read_text("utf-8"), re.S | re.M)[1])
    assert [name for name in OF_CORE - {"routing"} if f"``{name}``" not in docstring] == []
    assert [name for name in exported if f"`{name}`" not in docstring] == []


@pytest.mark.parametrize("package", ["cggr_core", "cggr_moe", "cggr_train"])
def test_every_module_stands_in_a_layer(package):
    """A module missing from import-linter's contracts could import anything, and form a cycle."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    named = {
        ".".join([*container, name.strip()])
        for contract in settings["contracts"]
        if contract["type"] == "layers"
        for container in ([[inside] for inside in contract["containers"]] if "containers" in contract else [[]])
        for layer in contract["layers"]
        for name in layer.split("|")
    }
    modules = [path.relative_to(PACKAGES).with_suffix("").parts[2:] for path in sources(package)]
    strangers = [
        ".".join(parts)
        for parts in modules
        if parts[-1] != "__init__" and not named & {".".join(parts[:end]) for end in range(2, len(parts) + 1)}
    ]
    assert not strangers and len(named) > 40


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
    assert [name for name, _, _ in imports(ast.parse("from cggr_core import routing"), depth=2)] == [
        "cggr_core.routing"
    ]
