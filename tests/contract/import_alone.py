"""Import every submodule of one distribution with everything it does not require blocked.

Run by ``nox -s alone`` with the Python of an environment that has only this distribution and its dependencies. A
distribution may be named with an extra (``cggr-core[transformers]``), whose requirements are then not blocked.
"""

import importlib
import pkgutil
import re
import sys
from importlib.metadata import requires, version

# What the packages of this workspace may be tempted to import; torch is everybody's.
BLOCKABLE = {"cggr", "cggr_core", "cggr_kernels", "cggr_flash", "cggr_moe", "cggr_train", "transformers", "triton"}

# Packages that need an extra: without it, importing them says what to install; with it, all of their modules import.
BEHIND_EXTRA = {"cggr_core.routing": "transformers>=5.17", "cggr_train.lightning": "lightning"}


def required(distribution: str) -> set[str]:
    """Modules of ``BLOCKABLE`` that a distribution may import: its own, and those of its requirements."""
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


def closed(package: str, missing: str) -> bool:
    """Whether importing a package fails with an error that says what to install; anything else that fails is raised."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        if f"pip install '{missing}" not in str(error) and f"pip install {missing}" not in str(error):
            raise
        return True
    return False


def main(distribution: str) -> None:
    blocked = BLOCKABLE - required(distribution)
    for blocked_module in blocked:
        sys.modules[blocked_module] = None  # type: ignore[assignment]
    name, _, extra = distribution.partition("[")
    package = importlib.import_module(name.replace("-", "_"))
    modules = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    shut = {door for door in BEHIND_EXTRA if door in modules and closed(door, BEHIND_EXTRA[door])}
    if extra and shut:
        raise SystemExit(f"{distribution}: {sorted(shut)} still ask for an extra")
    opened = [name for name in modules if not any(name == door or name.startswith(f"{door}.") for door in shut)]
    for opened_module in opened:
        importlib.import_module(opened_module)
    without = f" without {', '.join(sorted(blocked))}" + "".join(f"; {door} names its extra" for door in sorted(shut))
    print(f"{distribution} {version(name)}: {1 + len(opened)} modules import{without}")


if __name__ == "__main__":
    main(sys.argv[1])
