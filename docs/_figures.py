"""Plots lie beside their data in ``benchmarks/results/``; pages link to them there, and the site gets copies."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_IMAGE = re.compile(r"!\[([^\]]*)\]\((?:\.\./)+benchmarks/results/([\w.-]+\.png)\)")
_PLOT = re.compile(r"\((?:\.\./)+benchmarks/results/([\w.-]+\.png)\)")
_SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|examples)[\w./-]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every plot to the site as ``figures/NAME.png``."""
    for plot in _RESULTS.glob("*.png"):
        files.append(File.generated(config, f"figures/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point images at those copies, each a link to its full size; name files that have no page, without a link."""
    up = "../" * page.file.src_uri.count("/")
    with_plots = _IMAGE.sub(rf"[![\1]({up}figures/\2)]({up}figures/\2)", markdown)
    return _SOURCE.sub(_named, _PLOT.sub(rf"({up}figures/\1)", with_plots))


def _named(link: re.Match[str]) -> str:
    label, path = link.groups()
    return f"`{path}`" if label == Path(path).stem else f"{label} (`{path}`)"
