"""Docstrings are written for editors and the terminal; this makes pages of them without changing them."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|obj|exc):`(~?)([^`]+)`")
# The parser knows the section of examples by its plural.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# A table between lines of equals signs is shown as it stands.
_RULE = r"=+(?:  +=+)+"
_TABLE = re.compile(rf"^{_RULE}\n.+\n{_RULE}\n(?:.+\n)+?{_RULE}$", re.MULTILINE)


def _as_code(found: re.Match[str]) -> str:
    name = found[2].rpartition(".")[2] if found[1] else found[2]
    return f"`{name}`"


class Docstrings(griffe.Extension):
    """Show Sphinx roles as code, examples as code blocks, and plain tables as text."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _TABLE.sub(lambda table: f"```text\n{table[0].replace('``', '')}\n```", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub("Examples:", _ROLE.sub(_as_code, text))
