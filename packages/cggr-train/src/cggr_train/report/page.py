"""Self-contained HTML pages, with pictures, styles and scripts inside."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from cggr_train.errors import SaveError


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template of this folder and write it atomically.

    Args:
        path: HTML file to write.
        template: Name of the template.
        **values: Values of the template.

    Raises:
        SaveError: If it cannot be written (a full disk, say); an existing page is unchanged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cggr_train", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["picture"] = _data_url
    environment.filters["unbroken"] = unbroken
    page = environment.get_template(template).render(**values)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(f"the page {path} could not be written: {error.strerror or error}") from error


def visible(text: str) -> str:
    r"""Text with its white space made visible.

    Example:
        >>> visible(" x\n")
        '␣x⏎'
    """
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(part of a character)"


def unbroken(cell: str) -> str:
    r"""A table's cell, whose line may break before a bracket or ``±`` only.

    Example:
        >>> unbroken("+0.003 (+0.002 to +0.004)")
        '+0.003 (+0.002\xa0to\xa0+0.004)'
    """
    return re.sub(r" (?![(±])", "\N{NO-BREAK SPACE}", cell)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
