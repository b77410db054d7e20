"""Import every submodule of one distribution, with everything that it does not require blocked.

Run by ``nox -s alone`` with the Python of an environment that holds this distribution and its dependencies alone.
"""

import importlib
import pkgutil
import re
import sys
from importlib.metadata import requires

# What the packages of this workspace may be tempted to import; torch is everybody's.
BLOCKABLE = {"cggr", "cggr_core", "cggr_kernels", "cggr_flash", "cggr_moe", "cggr_train", "transformers", "triton"}


def required(distribution: str) -> set[str]:
    """Modules among ``BLOCKABLE`` that a distribution may import: its own, and those of its requirements."""
    name, _, extras = distribution.partition("[")
    modules = {name.replace("-", "_")}
    for requirement in requires(name) or ():
        condition = re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        if condition and condition[1] not in extras.rstrip("]").split(","):
            continue
        found = re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)
        assert found is not None
        if found[0].partition("[")[0].replace("-", "_") in BLOCKABLE:
            modules |= required(found[0]) if found[0].startswith("cggr") else {found[0]}
    return modules


def main(distribution: str) -> None:
    blocked = BLOCKABLE - required(distribution)
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    package = importlib.import_module(distribution.replace("-", "_"))
    modules = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    for name in modules:
        importlib.import_module(name)
    print(
        f"{distribution} {package.__version__}: {1 + len(modules)} modules import without {', '.join(sorted(blocked))}"
    )


if __name__ == "__main__":
    main(sys.argv[1])
