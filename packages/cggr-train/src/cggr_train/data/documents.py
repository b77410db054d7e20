"""Documents from text, JSON Lines and Parquet files, one string each."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from cggr_train.errors import InputError

JSON_LINES = frozenset({".jsonl", ".ndjson"})
PARQUET = frozenset({".parquet", ".pq"})
REFUSED = {
    **dict.fromkeys(
        (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"), "is compressed; unpack it and give the files inside"
    ),
    **dict.fromkeys(
        (".csv", ".tsv", ".xlsx", ".xls"),
        "is a table: convert it to .jsonl or .parquet, with the columns as keys (pandas: "
        "frame.to_json(path, orient='records', lines=True))",
    ),
    ".json": "is JSON: convert it to .jsonl with one object per line, or name it .txt if its text is the document",
}
"""Suffixes of files that would be misread as text."""
JSON_TYPES = {"NoneType": "null", "bool": "a truth value", "int": "a number", "float": "a number", "list": "a list",
              "dict": "an object", "str": "text"}  # fmt: skip


class Documents:
    r"""The documents of some files, reread by every iteration.

    ``.jsonl``/``.ndjson`` files hold one JSON object per line and ``.parquet``/``.pq`` files one row per
    document; the text is their ``field``. Every other file is one document of UTF-8 text, except that compressed files,
    tables (``.csv``) and ``.json`` are refused.

    Args:
        paths: The files, read in this order.
        field: Key or column that holds the text; several joined by a comma are concatenated with a newline
            (``"question,answer"``).
        skip_bad: Count lines that cannot be used in ``skipped`` instead of raising.

    Attributes:
        skipped: Lines left out by the latest complete iteration; always 0 without ``skip_bad``.

    Raises:
        InputError: On construction if a file is missing or of a kind that cannot be read; while iterating if one is
            unreadable, is not UTF-8, or holds a line or column that cannot be used (with file and line number).

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
        >>> _ = path.write_text('{"text": "one"}\n{"text": "two"}\n')
        >>> list(Documents([path]))
        ['one', 'two']
    """

    def __init__(self, paths: Sequence[str | Path], *, field: str = "text", skip_bad: bool = False) -> None:
        self.paths = [Path(path) for path in paths]
        self.fields = [part.strip() for part in field.split(",") if part.strip()]
        self.skip_bad = skip_bad
        self.skipped = 0
        if not self.paths:
            raise InputError("no data files were given; give at least one text, .jsonl or .parquet file")
        if not self.fields:
            raise InputError(f"--field must be the key or column that holds the text, got {field!r}")
        if len(set(self.fields)) < len(self.fields):
            raise InputError(f"--field must name each key once, got {field!r}")
        for path in self.paths:
            if not path.is_file():
                kind = "is a directory; give the files in it" if path.is_dir() else "does not exist"
                raise InputError(f"the data file {path} {kind}")
            if path.suffix.lower() in REFUSED:
                raise InputError(f"the data file {path} {REFUSED[path.suffix.lower()]}")

    def __iter__(self) -> Iterator[str]:
        """Yield every document that is not empty, in file order."""
        yield from filter(None, map("\n".join, self.records()))

    def check_first(self) -> None:
        """Read the first line or row, so that a wrong field is reported before slower work begins.

        Raises:
            InputError: If it cannot be used.
        """
        if has_fields(self.paths[0]):
            next(self.records(), None)
            self.skipped = 0

    def records(self) -> Iterator[tuple[str, ...]]:
        """Yield the text of each field of every document, in file order; a whole file is one text."""
        self.skipped = 0
        for path in self.paths:
            suffix = path.suffix.lower()
            reader = (
                self._json_lines if suffix in JSON_LINES else self._parquet if suffix in PARQUET else self._whole_file
            )
            try:
                yield from reader(path)
            except OSError as error:
                raise InputError(f"the data file {path} cannot be read: {error.strerror or error}") from error

    def _whole_file(self, path: Path) -> Iterator[tuple[str, ...]]:
        try:
            yield (path.read_text(encoding="utf-8-sig"),)  # without a byte order mark
        except UnicodeDecodeError as error:
            self._skip_or_raise(
                f"{path}: not UTF-8 text (byte {error.start}: {error.reason})", error, what="such files"
            )

    def _json_lines(self, path: Path) -> Iterator[tuple[str, ...]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise InputError(f"{path} is UTF-16 text; save it as UTF-8")
                try:
                    record = json.loads(line)
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # not JSON, not UTF-8, or too large numbers or too deep nesting
                    self._skip_or_raise(f"{path}, line {number}: not JSON ({error})", error)
                    continue
                parts = self._parts(record, f"{path}, line {number}")
                if parts is not None:
                    yield parts

    def _parquet(self, path: Path) -> Iterator[tuple[str, ...]]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"the data file {path} is not a Parquet file ({error})") from error
        with file:
            names = file.schema_arrow.names
            missing = [name for name in self.fields if name not in names]
            if missing:
                raise InputError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(names)} (see --field)")
            row = 0
            try:
                for batch in file.iter_batches(batch_size=1024, columns=self.fields):
                    for record in batch.to_pylist():
                        row += 1
                        parts = self._parts(record, f"{path}, row {row}")
                        if parts is not None:
                            yield parts
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise InputError(f"the data file {path} is damaged after row {row} ({error})") from error

    def _parts(self, record: object, where: str) -> tuple[str, ...] | None:
        if not isinstance(record, dict):
            self._skip_or_raise(f"{where}: expected an object with {' and '.join(self.fields)}, got {_kind(record)}")
            return None
        parts = []
        for name in self.fields:
            value = record.get(name)
            if not isinstance(value, str):
                found = ", ".join(map(str, record)) or "nothing"
                given = _kind(value) if name in record else f"no such key (it has {found}; see --field)"
                self._skip_or_raise(f"{where}: {name!r} should be text, got {given}")
                return None
            parts.append(value)
        text = "\n".join(parts)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self._skip_or_raise(
                f"{where}: half a surrogate pair ({text[error.start]!r}), which is not a character", error
            )
            return None
        return tuple(parts)

    def _skip_or_raise(self, message: str, cause: Exception | None = None, *, what: str = "such lines") -> None:
        if not self.skip_bad:
            raise InputError(f"{message}; --skip-bad skips {what} and counts them") from cause
        self.skipped += 1


def has_fields(path: Path) -> bool:
    """Whether the documents of a file have named fields."""
    return path.suffix.lower() in JSON_LINES | PARQUET


def _kind(value: object) -> str:
    name = type(value).__name__
    return JSON_TYPES.get(name, name)
