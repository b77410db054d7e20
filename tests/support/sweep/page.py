"""The page of the docs that says what was found, class by class."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

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
_INTRO = """# Supported models

Every causal and masked language-model class of transformers {transformers} that can be built small, on torch {torch}: with random
weights larger than an initialisation's, in training mode, on rows of {lengths} tokens, whole, padded on either side, and packed.
`exact` at a keep ratio of 1 is held to the model's own loss; `kv` and `detached`, both engines, to an autograd graph over all
tokens in which every layer is told where to stop (losses to {loss:.0e}, gradients to {gradient:.0e} of their norm).

{summary}

Written by `nox -s sweep`. A model with code of its own, another mask or another head may differ from its class: the first step
looks at it, and refuses what it cannot do.
"""  # noqa: E501, wrapped as the other pages are


def group(report: Report) -> str:
    """The group of a class, a key of :data:`GROUPS`."""
    if report["built"]:
        return "untried"
    found = report["found"]
    verdicts = {line["verdict"] for line in found}
    if "wrong" in verdicts:
        return "wrong"
    if "exact" not in verdicts:
        return "none" if "refused" in verdicts else "untried"
    routed = {line["verdict"] for line in found if line["mode"] != "exact" and line["layout"] != "packed"}
    return "every" if routed <= {"exact", "none"} and "exact" in routed else "exact"


def page(reports: Iterable[Report], versions: Mapping[str, str], **facts: Any) -> str:
    """Markdown of the page.

    Args:
        reports: Of :func:`tests.support.sweep.judge.judge`, one for each class.
        versions: Of torch and transformers.
        **facts: The other fields of the introduction.
    """
    groups: dict[str, list[Report]] = {name: [] for name in GROUPS}
    for report in sorted(reports, key=lambda report: report["class"].lower()):
        groups[group(report)].append(report)
    counts = ", ".join(f"{GROUPS[name][0].replace('`', '')}: {len(part)}" for name, part in groups.items())
    text = [_INTRO.format(**versions, **facts, summary=f"{sum(map(len, groups.values()))} classes: {counts}.")]
    for name, part in groups.items():
        if part:
            title, meaning = GROUPS[name]
            text.append(f"## {title}\n\n{meaning}\n\n{_table(name, part)}\n")
    return "\n".join(text)


def _table(name: str, reports: Sequence[Report]) -> str:
    if name == "every":
        head = ("Class", "Padded rows", "Packed rows")
        rows = [(_code(report), _layout(report, "padded"), _layout(report, "packed")) for report in reports]
    else:
        head = ("Class", "Why")
        rows = [(_code(report), _why(report)) for report in reports]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _code(report: Report) -> str:
    return f"`{report['class']}`"


def _layout(report: Report, layout: str) -> str:
    lines = [line for line in report["found"] if line["layout"] == layout]
    routed = {line["verdict"] for line in lines if line["mode"] != "exact"}
    words = {"exact": "exact", "refused": "refused in `kv` and `detached`", "none": "nothing to compare with"}
    # What a few lengths leave undecided does not hide what the others show.
    decided = routed - {"none"} or routed
    return ", ".join(words[verdict] for verdict in words if verdict in decided)


def _why(report: Report) -> str:
    if report["built"]:
        return _cell(report["built"])
    for verdict in ("wrong", "refused", "none"):
        for line in report["found"]:
            if line["verdict"] == verdict and (verdict != "refused" or line["layout"] != "packed"):
                return _cell(f"{line['mode']}: {line['detail']}" if verdict == "wrong" else line["detail"])
    return ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")[:300]
