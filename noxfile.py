"""Every job of the workspace, each in an environment of its own: ``python -m nox -s NAME``, ``python -m nox -l``."""

import json
import os
import platform
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = str(ROOT / "constraints.txt")
PACKAGES = ("cggr-core", "cggr-kernels", "cggr-flash", "cggr-moe", "cggr-train", "cggr")
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "peft", "accelerate", "trl", "lightning")
# What runs on every supported set of versions: exactness, the Trainers and the command.
VERSION_TESTS = (
    "tests/core",
    "tests/flash",
    "tests/train/test_trainer.py",
    "tests/train/test_trainer_bad_input.py",
    "tests/train/test_trl.py",
    "tests/train/test_doctor.py",
    "tests/e2e",
)
# The oldest that the packages ask for; a test holds these to their requirements.
OLDEST = ("torch==2.11.0", "transformers==5.17.0")
CPU_BENCHMARKS = (("benchmarks.step_time", "cpu"), ("benchmarks.step_flops", "--shapes", "cpu"))
# With an option as well: core's routing, which is shut without transformers, and the loading of models.
ONCE_MORE = {"cggr-core": ("[transformers]",), "cggr": ("[flash]",)}
# Bytecode is written for what is imported, also where the caller's environment says otherwise: without it every process
# compiles torch and transformers anew, for many seconds.
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}
# One torch thread per test process (two processes share the machine), and no look at a model hub.
QUIET = BYTECODE | {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = True


def project(package: str) -> dict[str, Any]:
    with (ROOT / "packages" / package / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def module(package: str) -> str:
    return package.replace("-", "_")


def install(session: nox.Session, *requirements: str, packages: tuple[str, ...] = ()) -> None:
    """Install requirements and packages of this workspace (editable) at the versions of constraints.txt.

    ``nox --no-venv`` leaves the environment as it is: a machine with a GPU keeps the torch that it has.
    """
    if session.virtualenv.is_sandboxed is False:
        return
    told = "PIP_EXTRA_INDEX_URL" in os.environ or "PIP_FIND_LINKS" in os.environ
    if packages and platform.system() == "Linux" and not shutil.which("nvidia-smi") and not told:
        session.log(
            "no CUDA here; for a CPU build of torch, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS: see CONTRIBUTING.md"
        )
    # The build backend first: without build isolation pip fetches it once, at the pinned version.
    if packages:
        session.install("-c", CONSTRAINTS, "hatchling", "editables")
    paths = [argument for package in packages for argument in ("-e", extended(package))]
    # Bytecode is written for the modules that get imported, rather than for all of torch.
    session.install("--no-compile", "--no-build-isolation", "-c", CONSTRAINTS, *requirements, *paths)


def extended(package: str) -> str:
    """Path of a package, with transformers for the one that has it as an option."""
    return f"./packages/{package}" + ("[transformers]" if package == "cggr-core" else "")


def build_distributions(session: nox.Session, folder: Path) -> None:
    """Build the source distribution of every package, and the wheel from it."""
    session.install("-c", CONSTRAINTS, "build", "hatchling")
    for package in PACKAGES:
        arguments = ("--no-isolation", "--outdir", str(folder), f"packages/{package}")
        session.run("python", "-m", "build", *arguments, silent=True)


def empty_environment(session: nox.Session, folder: Path) -> str:
    """Make an environment with nothing in it, not even pip, and return its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "venv", "--without-pip", str(folder), silent=True)
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small model four ways side by side on this Python's own source, and write the report."""
    session.log("installing CGGR and what it needs: seconds to minutes, 0.3 GB with the CPU build of PyTorch")
    install(session, packages=("cggr-core", "cggr-train", "cggr"))
    session.run("cggr", "demo", *session.posargs, env=BYTECODE)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that need no accelerator, and the examples of the docstrings."""
    install(session, *TEST_TOOLS, packages=PACKAGES)
    if session.posargs:
        session.run("pytest", *session.posargs, env=QUIET)
        return
    # The kernels' docstrings need a GPU, their tests the interpreter: they have sessions of their own.
    sources = [f"packages/{package}/src" for package in PACKAGES if package != "cggr-kernels"]
    session.run("pytest", "--doctest-modules", *sources, env=QUIET)
    session.run("pytest", "-n", "2", "--ignore=tests/kernels", env=QUIET)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the exactness suite and the end-to-end tests on the oldest supported torch and transformers."""
    run_on_versions(session, *OLDEST)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the exactness suite and the end-to-end tests on the newest releases, whatever they are today."""
    run_on_versions(session, "torch", "transformers", "trl", "peft", "accelerate")
    session.run("python", "tests/contract/newest_versions.py")


def run_on_versions(session: nox.Session, *versions: str) -> None:
    """Install this workspace beside given versions, with nothing pinned but those, and run what depends on them."""
    tools = (*TEST_TOOLS, "numpy<2.4", "hatchling", "editables")  # numpy: Triton's interpreter breaks on 2.4
    session.install("--no-compile", *versions, *tools)
    paths = [argument for package in PACKAGES for argument in ("-e", extended(package))]
    session.install("--no-compile", "--no-build-isolation", *versions, "numpy<2.4", *paths)
    session.run("pytest", "-n", "2", *(session.posargs or VERSION_TESTS), env=QUIET)


@nox.session
def fresh(session: nox.Session) -> None:
    """Install as the README says, without constraints, and hold three steps in ``kv`` to plain transformers."""
    environment = Path(session.create_tmp()) / "fresh"
    shutil.rmtree(environment, ignore_errors=True)
    session.run("python", "-m", "venv", str(environment), silent=True)
    python = str(environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    for line in readme_install_lines():
        session.run(python, "-m", "pip", "install", "--quiet", "--no-compile", *line, external=True)
        session.run(python, "tests/contract/fresh_install.py", env=BYTECODE, external=True)
    shutil.rmtree(environment)


@nox.session
def sweep(session: nox.Session) -> None:
    """Judge every language-model class of transformers, and write docs/supported-models/; ``-- --help`` for more."""
    install(session, "rich", packages=("cggr-core",))
    session.run("python", "-m", "tests.support.sweep", *session.posargs, env=QUIET)


@nox.session(name="sweep-newest")
def sweep_newest(session: nox.Session) -> None:
    """Do the same with the newest releases of torch and transformers, whatever they are today."""
    session.install("--no-compile", "torch", "transformers", "rich", "numpy", "hatchling", "editables")
    session.install("--no-compile", "--no-build-isolation", "-e", extended("cggr-core"))
    session.run("python", "-m", "tests.support.sweep", *session.posargs, env=QUIET)


def readme_install_lines() -> list[list[str]]:
    """What follows ``python -m pip install`` in the README's section on installing, less the constraints.

    Braces are expanded as a shell does.
    """
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Install\n")[1].split("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("python -m pip install ") and "./packages/" in line:
            arguments: list[str] = []
            for word in shlex.split(line, comments=True)[4:]:
                before, brace, rest = word.partition("{")
                choices, _, after = rest.partition("}")
                arguments += [before + choice + after for choice in choices.split(",")] if brace else [word]
            found.append([argument for argument in arguments if argument not in ("-c", "constraints.txt")])
    if not found:
        raise ValueError("README.md has no 'python -m pip install ./packages/...' line under '## Install'")
    return found


@nox.session
def interpret(session: nox.Session) -> None:
    """Run the kernels' tests on the CPU, in Triton's interpreter."""
    install(session, *TEST_TOOLS[:3], packages=("cggr-core", "cggr-kernels", "cggr-moe"))
    session.run("pytest", *(session.posargs or ["-n", "2", "tests/kernels"]), env=QUIET | {"TRITON_INTERPRET": "1"})


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need an accelerator; with ``--no-venv`` on the torch that is installed."""
    install(session, *TEST_TOOLS, packages=PACKAGES)
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/gpu"]), "-m", "gpu")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format, the prose of the documents, and that the changelog fragments render."""
    install(session, "ruff", "towncrier", "proselint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    prose = [*ROOT.glob("*.md"), ROOT / "docs", ROOT / "benchmarks/README.md", *ROOT.glob("packages/*/README.md")]
    session.run("proselint", "--config", ".proselintrc.json", "check", *map(str, prose))
    for package in PACKAGES:
        draft = ("--draft", "--config", "pyproject.toml", "--dir", f"packages/{package}")
        session.run(
            "towncrier", "build", *draft, "--name", package, "--version", project(package)["version"], silent=True
        )


@nox.session
def types(session: nox.Session) -> None:
    """Check types, and that every public name is fully typed."""
    install(session, "pyright[nodejs]", "nox", "griffe", "lightning", packages=PACKAGES)
    session.run("pyright", *session.posargs)
    for package in PACKAGES:
        arguments = ("--outputjson", "--ignoreexternal", "--verifytypes", module(package))
        # Its exit status also counts attributes whose type is inferred; an unknown type is what a user suffers from.
        output = session.run("pyright", *arguments, silent=True, success_codes=[0, 1])
        report = json.loads(str(output)[str(output).index("{") :])["typeCompleteness"]
        public = [symbol for symbol in report["symbols"] if symbol["isExported"]]
        unknown = [symbol["name"] for symbol in public if not symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]]
        if unknown or not report.get("pyTypedPath"):
            session.error(f"{package}: no py.typed, or public names whose type is unknown: {unknown}")
        session.log(f"{package}: {len(public)} public names, none of unknown type")


@nox.session
def boundaries(session: nox.Session) -> None:
    """Hold the packages to their direction of dependency; nothing is imported, so torch is not needed."""
    install(session, "import-linter", "pytest")
    sources = os.pathsep.join(str(ROOT / "packages" / package / "src") for package in PACKAGES)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})
    session.run("pytest", "tests/contract/test_imports.py")


@nox.session
def alone(session: nox.Session) -> None:
    """Install each wheel with only its own dependencies and import all of it with everything else blocked."""
    wheels = Path(session.create_tmp()) / "dist"
    shutil.rmtree(wheels, ignore_errors=True)
    build_distributions(session, wheels)
    for package in session.posargs or PACKAGES:
        environment = Path(session.create_tmp()) / package
        python = empty_environment(session, environment)
        (wheel,) = wheels.glob(f"{module(package)}-*.whl")
        options = ("--no-compile", "--quiet", "-c", CONSTRAINTS, "--find-links", str(wheels))
        for extra in ("", *ONCE_MORE.get(package, ())):
            session.run("python", "-m", "pip", "--python", python, "install", *options, f"{wheel}{extra}")
            session.run(python, "-I", "tests/contract/import_alone.py", f"{package}{extra}", external=True)
        if package == "cggr":
            session.run(python, "-I", "tests/contract/load_with_flash.py", external=True)
        shutil.rmtree(environment)


@nox.session
def extras(session: nox.Session) -> None:
    """Resolve the extras of the metapackage from the built wheels, without installing anything."""
    wheels = Path(session.create_tmp()) / "dist"
    shutil.rmtree(wheels, ignore_errors=True)
    build_distributions(session, wheels)
    core = {"cggr", "cggr-core"}
    expected = {
        "cggr": core,
        "cggr[cuda,flash]": core | {"cggr-kernels", "cggr-moe", "cggr-flash"},
        "cggr[train]": core | {"cggr-train"},
        "cggr[all]": set(PACKAGES),
    }
    for requirement, packages in expected.items():
        report = Path(session.create_tmp()) / "report.json"
        options = ("--dry-run", "--ignore-installed", "--quiet", "--report", str(report), "--find-links", str(wheels))
        session.run("python", "-m", "pip", "install", *options, "-c", CONSTRAINTS, requirement)
        found = {}
        for item in json.loads(report.read_text())["install"]:
            name = item["metadata"]["name"].lower().replace("_", "-")
            if name in PACKAGES:
                found[name] = (item["metadata"]["version"], item["download_info"]["url"])
        if found.keys() != packages:
            session.error(f"{requirement} resolves to {sorted(found)}, expected {sorted(packages)}")
        for name, (version, url) in found.items():
            if version != project(name)["version"] or not url.startswith(wheels.resolve().as_uri()):
                session.error(f"{requirement} takes {name} {version} from {url}, not from the wheels built here")
        session.log(f"{requirement}: " + ", ".join(f"{name} {version}" for name, (version, _) in sorted(found.items())))


@nox.session
def api(session: nox.Session) -> None:
    """Compare the public names and signatures with the committed snapshot; ``-- --update`` rewrites it."""
    install(session, "griffe")
    session.run("python", "tests/contract/public_api.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; ``-- serve`` shows it while you write."""
    install(session, "mkdocs-material", "mkdocstrings[python]", "ruff")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels and source distributions of all packages into dist/."""
    build_into_dist(session)


@nox.session
def release(session: nox.Session) -> None:
    """Build dist/, check its metadata, install it alone in a fresh environment and run the README's examples there."""
    files = build_into_dist(session)
    session.install("-c", CONSTRAINTS, "twine")
    session.run("twine", "check", "--strict", *files)
    environment = Path(session.create_tmp()) / "released"
    python = empty_environment(session, environment)
    wheels = [file for file in files if file.endswith(".whl")]
    options = ("--no-compile", "--quiet", "-c", CONSTRAINTS)
    session.run("python", "-m", "pip", "--python", python, "install", *options, *wheels, "trl")
    session.run(python, "-I", "tests/contract/readme_from_dist.py", env=QUIET, external=True)
    shutil.rmtree(environment)


def build_into_dist(session: nox.Session) -> list[str]:
    """Build all packages into dist/ and return what was built."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    build_distributions(session, ROOT / "dist")
    files = sorted((ROOT / "dist").iterdir())
    if len(files) != 2 * len(PACKAGES):
        session.error(f"expected a wheel and a source distribution of each package, found {len(files)} files in dist/")
    for path in files:
        session.log(path.name)
    return [str(path) for path in files]


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks that a CPU can, or the module and arguments after ``--``; they write benchmarks/results/."""
    install(session, packages=PACKAGES)
    for run in [session.posargs] if session.posargs else CPU_BENCHMARKS:
        # As modules: a script's own folder would come first on the path, and ``kernels.py`` hide the package "kernels".
        session.run("python", "-m", *run)
