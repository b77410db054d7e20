"""The page of the docs that says what was found: class by class, with a column for each version of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.sweep.results import Results

Class = Mapping[str, Any]

GROUPS = {
    "every": ("Every mode", "Loss and gradients are exact in `exact`, `kv` and `detached`."),
    "exact": (
        "`exact` and `sequence` only",
        "The loss and its gradient are those of the model at a keep ratio of 1; `kv` and `detached` say why not.",
    ),
    "none": ("No mode", "Refused at construction or at the first step, with what is said here."),
    "untried": ("Not tried", "The class could not be built small, or does not train on token ids and labels alone."),
    "wrong": ("Wrong", "A number that neither plain transformers nor the reference gives, or an error from within."),
}
_IN_A_CELL = {"every": "every mode", "exact": "exact", "none": "refused", "untried": "not tried", "wrong": "wrong"}
_INTRO = """# Supported models

Every causal and masked language-model class of transformers that can be built small, with random weights larger than an
initialisation's, in training mode, on rows of {lengths} tokens, whole, padded on either side, and packed. `exact` at a keep ratio
of 1 is held to the model's own loss; `kv` and `detached`, both engines, to an autograd graph over all tokens in which every layer
is told where to stop (losses to {loss:.0e}, gradients to {gradient:.0e} of their norm).

{summary}

Classes stand where the newest of these versions puts them. Packed rows are `exact`'s alone where a cell says so: the model attends
across documents, or its layers cannot be asked about part of a packed row. A dash: the version does not have the class.

Written by `nox -s sweep`. A model with code of its own, another mask or another head may differ from its class: the first step
looks at it, and refuses what it cannot do.
"""  # noqa: E501, wrapped as the other pages are


def group(found: Class) -> str:
    """The group of a class, a key of :data:`GROUPS`."""
    if found["built"]:
        return "untried"
    lines = found["found"]
    verdicts = {line["verdict"] for line in lines}
    if "wrong" in verdicts:
        return "wrong"
    if "exact" not in verdicts:
        return "none" if "refused" in verdicts else "untried"
    routed = {line["verdict"] for line in lines if line["mode"] != "exact" and line["layout"] != "packed"}
    return "every" if routed <= {"exact", "none"} and "exact" in routed else "exact"


def page(versions: Sequence[Results], **facts: Any) -> str:
    """Markdown of the page.

    Args:
        versions: What was found with each, the oldest first.
        **facts: The other fields of the introduction.
    """
    newest = {name: found for results in versions for name, found in results.classes.items()}
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    for name in sorted(newest, key=str.lower):
        groups[group(newest[name])].append(name)
    text = [_INTRO.format(**facts, summary=_summary(versions))]
    for name, classes in groups.items():
        if classes:
            title, meaning = GROUPS[name]
            head = ["Class", *(results.version for results in versions), *([] if name == "every" else ["Why"])]
            rows = [
                [
                    f"`{part}`",
                    *(_cell(results.classes.get(part)) for results in versions),
                    *([] if name == "every" else [_why(newest[part])]),
                ]
                for part in classes
            ]
            text.append(f"## {title}\n\n{meaning}\n\n{_table(head, rows)}\n")
    return "\n".join(text)


def _summary(versions: Sequence[Results]) -> str:
    head = ["transformers", "torch", "classes", *(title for title, _ in GROUPS.values())]
    rows = []
    for results in versions:
        found = [group(part) for part in results.classes.values()]
        counts = [str(found.count(name)) for name in GROUPS]
        rows.append([results.version, results.environment["torch"], str(len(found)), *counts])
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _cell(found: Class | None) -> str:
    if found is None:
        return "—"
    where = group(found)
    packed = {line["verdict"] for line in found["found"] if line["layout"] == "packed" and line["mode"] != "exact"}
    return _IN_A_CELL[where] + (", not packed" if where == "every" and "refused" in packed else "")


def _why(found: Class) -> str:
    if found["built"]:
        return _escaped(found["built"])
    for verdict in ("wrong", "refused", "none"):
        for line in found["found"]:
            if line["verdict"] == verdict and (verdict != "refused" or line["layout"] != "packed"):
                return _escaped(f"{line['mode']}: {line['detail']}" if verdict == "wrong" else line["detail"])
    return ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")[:300]
