"""Plots lie beside their data in ``benchmarks/results/``; pages link to them there, and the site gets copies."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_IMAGE = re.compile(r"\((?:\.\./)+benchmarks/results/([\w.-]+\.png)\)")
_SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|examples)[\w./-]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every plot to the site as ``figures/NAME.png``."""
    for plot in _RESULTS.glob("*.png"):
        files.append(File.generated(config, f"figures/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point images at those copies, and name files of the repository that have no page instead of linking to them."""
    up = "../" * page.file.src_uri.count("/")
    return _SOURCE.sub(r"\1 (`\2`)", _IMAGE.sub(rf"({up}figures/\1)", markdown))
