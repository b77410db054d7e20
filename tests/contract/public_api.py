"""Public names and signatures of every package, read from the source and compared with a committed snapshot.

``python tests/contract/public_api.py`` prints the difference and fails; ``--update`` writes the snapshot.
"""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "public_api.txt"
PACKAGES = ("cggr", "cggr_core", "cggr_kernels", "cggr_flash", "cggr_moe", "cggr_train")


def signature(function: griffe.Function) -> str:
    """Parameters with annotations and defaults, and the return annotation, on one line."""
    return function.signature(return_type=True).removeprefix(function.name)


def describe(name: str, member: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Lines for one public member; for a class, its bases and its public members too, inherited ones included."""
    if isinstance(member, griffe.Alias):
        if member.target_path.partition(".")[0] != name.partition(".")[0]:
            yield f"{name} = {member.target_path}"  # another package's own lines say the rest
            return
        try:
            member = member.final_target
        except griffe.AliasResolutionError:
            yield f"{name} = {member.target_path}"
            return
    if isinstance(member, griffe.Function):
        labels = "".join(f"@{label} " for label in sorted(member.labels & {"classmethod", "staticmethod"}))
        yield f"{labels}{name}{signature(member)}"
    elif isinstance(member, griffe.Class):
        bases = ", ".join(str(base) for base in member.bases)
        yield f"class {name}({bases})"
        for inner, value in sorted((member.inherited_members | member.members).items()):
            if inner in ("__init__", "__call__") or not inner.startswith("_"):
                yield from describe(f"{name}.{inner}", value)
    elif isinstance(member, griffe.Attribute):
        annotation = f": {member.annotation}" if member.annotation is not None else ""
        yield f"{name}{annotation}"
    elif isinstance(member, griffe.Module):
        yield f"module {name}"


def lines() -> Iterator[str]:
    """The snapshot's lines, package by package, for the names in each ``__all__``."""
    paths = [ROOT / "packages" / package.replace("_", "-") / "src" for package in PACKAGES]
    loader = griffe.GriffeLoader(search_paths=paths, allow_inspection=False)
    modules = [loader.load(package) for package in PACKAGES]
    loader.resolve_aliases(external=False)
    for module in modules:
        exports = [str(name) for name in module.exports or ()]
        for name in sorted(exports):
            if name not in module.members:
                raise SystemExit(f"{module.name}.__all__ names {name!r}, which the module does not define")
            yield from describe(f"{module.name}.{name}", module.members[name])


def main(arguments: list[str]) -> int:
    """Compare, or update; returns the exit status."""
    current = [line + "\n" for line in lines()]
    if "--update" in arguments:
        SNAPSHOT.write_text("".join(current), encoding="utf-8")
        print(f"{SNAPSHOT.relative_to(ROOT)}: {len(current)} lines")
        return 0
    committed = SNAPSHOT.read_text(encoding="utf-8").splitlines(keepends=True) if SNAPSHOT.exists() else []
    difference = list(difflib.unified_diff(committed, current, "committed", "current"))
    if difference:
        sys.stdout.writelines(difference)
        print("\nThe public API changed. If that is meant: nox -s api -- --update, a changelog fragment, commit both.")
        return 1
    print(f"{len(current)} lines of public API, as committed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
