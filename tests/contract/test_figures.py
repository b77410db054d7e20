"""Every figure in the tables of the documents comes from the linked JSON under ``benchmarks/results/``."""

import re
from itertools import pairwise

import pytest

from benchmarks import _evidence_tables, step_figures, trl_figures
from tests.support.documents import DOCUMENTS, ROOT
from tests.support.figures import Figure, figures, is_given, load, results_named, sections, values

WITHOUT_RESULTS = {
    ("README.md", "In TRL"): "the table that benchmarks.trl_figures writes, held below",
    ("docs/evidence.md", "Evidence from pretrained models"): "sums up the tables below it",
    ("docs/concepts/vocabulary.md", "Vocabulary"): "labels",
    ("docs/guides/command.md", "Runs"): "exit codes",
    ("docs/guides/context-precision.md", "What runs in FP8"): "shares of a Llama's operations",
    (
        "docs/install.md",
        "The CPU build of PyTorch",
    ): "sizes of wheels; the page says how to measure them",
}
"""Sections whose tables have numbers that no benchmark gives, and what they are."""
WORKED_OUT = {
    ("docs/concepts/selection.md", "The schedule"): {"200": "steps of training, a setting"},
    ("docs/guides/distributed.md", "Speed"): {
        "95%": "efficiency, from two results", "94%": "the same", "97%": "the same", "92%": "the same",
        "86%": "the same", "80%": "the same", "81%": "the same", "1.57": "a ratio of tokens per second",
    },
    ("docs/guides/trl.md", "Speed"): {
        "4.1": "bytes by source over tokens and layers", "10.4": "the same", "32.8": "the same", "10.9": "the same",
        "41.0": "the same", "117": "the same",
    },
    ("docs/results.md", "A 1B model on one H200, and with FP8 for other tokens"): {
        figure: "operators of the profile, added up"
        for figure in (
            "65.0", "620", "880", "63%", "748", "76%", "11.1", "337", "431", "4.1", "88%", "4.0", "91%", "3.4", "33%",
            "66%", "89%", "8.6", "1.5",
        )
    },
    ("docs/results.md", "Kernels"): {"1.03": "memory over that of torch.compile"},
    ("docs/when-not.md", "When not to use it"): {
        "1,402": "steps times the batch", "1,956": "the same", "2,416": "the same", "2,264": "the same",
    },
}  # fmt: skip
"""Figures that a reader works out from more than one number of a result, and how."""


def written_by_hand(section: str) -> str:
    """A section without the tables that are held to a script's output, figure by figure, below."""
    for name in _evidence_tables.TABLES:
        begin, end = _evidence_tables.between(name)
        if begin in section:
            section = section.split(begin)[0] + section.split(end)[1]
    return section


TABLES = [
    pytest.param(document, heading, section, id=f"{document.relative_to(ROOT)}: {heading}")
    for document in DOCUMENTS
    for heading, section in ((heading, written_by_hand(text)) for heading, text in sections(document))
    if document.parent.name != "supported-models" and any(True for _ in figures(section))
]


def missing(section: str, names: list[str]) -> list[Figure]:
    given = {value for name in names for value in values(load(name))}
    return [figure for figure in figures(section) if not is_given(figure, given)]


@pytest.mark.parametrize(("document", "heading", "section"), TABLES)
def test_figures_are_those_of_the_results_that_a_section_names(document, heading, section):
    where = (str(document.relative_to(ROOT)), heading)
    names = results_named(section)
    if where in WITHOUT_RESULTS:
        assert not names
        return
    assert names, "a table of figures names no JSON of benchmarks/results/"
    wrong = {
        f"{figure.text}{figure.unit} in {figure.line}"
        for figure in missing(section, names)
        if figure.text + ("%" if figure.unit == "%" else "") not in WORKED_OUT.get(where, {})
    }
    assert not wrong, f"not in {names}"


def test_what_is_left_out_is_still_there():
    tables = {(str(param.values[0].relative_to(ROOT)), param.values[1]): param.values[2] for param in TABLES}
    assert WITHOUT_RESULTS.keys() <= tables.keys()
    for where, left_out in WORKED_OUT.items():
        found = {figure.text + ("%" if figure.unit == "%" else "") for figure in figures(tables[where])}
        assert left_out.keys() <= found, where


def test_tables_are_what_their_scripts_write():
    trainers = trl_figures.results()
    for document, name, table in (
        ("README.md", "steps", step_figures.table(load(step_figures.RESULT)["rows"])),
        ("README.md", "trainers", trl_figures.short(trainers)),
        ("docs/guides/trl.md", "trainers", trl_figures.long(trainers)),
    ):
        assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->" in (ROOT / document).read_text(encoding="utf-8")
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for name in _evidence_tables.TABLES:
        begin, end = _evidence_tables.between(name)
        assert begin + _evidence_tables.table(name) + end in evidence


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_time_speedup_and_memory_of_a_step_come_from_one_row(document):
    """In tables of ``step | ms | speedup | … | peak memory``."""
    checked = 0
    for _, section in sections(ROOT / document):
        names = [name for name in results_named(section) if name.startswith("step_time_")]
        measured = [
            (f"{1000 * row['median']:,.1f}", f"{1000 * row['median']:,.0f}", f"{row['ratio']['median']:.2f}x")
            for name in names
            for row in load(name)["rows"].values()
        ]
        memory = {
            (f"{1000 * row['median']:.1f}", f"{row['peak_extra_bytes'] / 1e9:.1f} GB")
            for name in names
            for row in load(name)["rows"].values()
        }
        table = section[section.find("| step | ms | speedup |") :] if "| step | ms | speedup |" in section else ""
        for cells in re.findall(r"^\| (.+) \|$", table.split("\n\n")[0], re.MULTILINE):
            first, *rest = re.split(r" ?\| ?", cells)
            pairs = [
                (time, speedup)
                for time, speedup in pairwise(rest)
                if re.match(r"[\d,.]+$", time) and re.match(r"[\d.]+x", speedup)
            ]
            for time, speedup in pairs:
                assert any(time in row[:2] and speedup.startswith(row[2]) for row in measured), f"{first}: {pairs}"
                checked += 1
            if pairs and re.match(r"[\d.]+ GB$", rest[-1]) and "." in pairs[0][0]:
                assert any((time, rest[-1]) in memory for time, _ in pairs), f"{first}: {rest}"
    assert checked >= 6


@pytest.mark.parametrize(
    ("document", "heading", "text", "changed"),
    [
        ("docs/results.md", "An 8B model's layers", "| 122.7 | 1.84x |", "| 123.9 | 1.84x |"),
        ("docs/results.md", "Two CPU cores", "| 0.55 GB |", "| 0.85 GB |"),
        ("docs/frontier.md", "135M parameters", "| 0.54 |", "| 0.48 |"),
    ],
)
def test_a_changed_figure_is_noticed(document, heading, text, changed):
    section = dict(sections(ROOT / document))[heading]
    assert text in section
    assert missing(section.replace(text, changed, 1), results_named(section))
