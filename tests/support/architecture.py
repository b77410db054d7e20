"""The tree in docs/architecture.md: every module of every package, with the first line of its docstring.

``python tests/support/architecture.py`` prints the difference and fails; ``--update`` writes the tree.
"""

import ast
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("cggr-core", "cggr-kernels", "cggr-flash", "cggr-moe", "cggr-train", "cggr")
START, END = "<!-- tree: python tests/support/architecture.py --update -->\n", "<!-- end of tree -->\n"


def first_line(path: Path) -> str:
    """The first line of a module's docstring, without the full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def tree(folder: Path, indent: str = "") -> Iterator[str]:
    """Lines for a package's folder: its modules, then its folders, described by their ``__init__.py``."""
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    for path in modules:
        yield f"{indent}{path.name:<{32 - len(indent)}} {first_line(path)}"
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield f"{indent}{inner.name + '/':<{32 - len(indent)}} {first_line(inner / '__init__.py')}"
        yield from tree(inner, indent + "  ")


def section() -> str:
    """All packages, as they appear between the page's two marks."""
    parts = []
    for package in PACKAGES:
        folder = ROOT / "packages" / package / "src" / package.replace("-", "_")
        lines = "\n".join([f"{folder.name}/", *(line.rstrip() for line in tree(folder, "  "))])
        parts.append(f"### {package}\n\n{first_line(folder / '__init__.py')}.\n\n```\n{lines}\n```\n")
    return "\n" + "\n".join(parts) + "\n"


def committed() -> tuple[str, str, str]:
    """The page before its tree, the tree, and what follows."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    inside, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE.name} has lost its marks {START.strip()!r} and {END.strip()!r}")
    return before, inside, after


def main(arguments: list[str]) -> int:
    """Compare, or update; returns the exit status."""
    before, inside, after = committed()
    current = section()
    if "--update" in arguments:
        PAGE.write_text(before + START + current + END + after, encoding="utf-8")
        return 0
    difference = list(difflib.unified_diff(inside.splitlines(True), current.splitlines(True), "committed", "current"))
    if difference:
        sys.stdout.writelines(difference)
        print("\nThe tree changed: python tests/support/architecture.py --update, and commit the page.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
