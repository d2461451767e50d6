"""Files of molecules as text, compressed or not: which kind they are, and their lines. RDKit is not needed.

A line ends with a line feed, or carriage return and line feed, and nothing else: a form feed in a name does not end it.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tiltflow.core.errors import TiltflowError

KINDS = {
    ".smi": "smiles", ".smiles": "smiles", ".sdf": "sdf", ".sd": "sdf", ".mol": "mol", ".csv": "table", ".tsv": "table",
}  # fmt: skip
"""Of file names; each may be followed by .gz."""
NAMES = ("name", "id", "title", "compound", "molecule", "cid", "identifier")
"""Columns of a table that name a molecule; the first of them that there is."""
MOST, RATIO, FREE = 1 << 30, 200, 16 << 20
"""Most bytes of a file, unpacked; bytes out of one of a .gz that no molecules pack to, looked at after the first 16 MiB."""


class Row(NamedTuple):
    """A row of a table: its line in the file, and its other columns as data fields."""

    line: int
    smiles: str
    name: str
    fields: dict[str, str]


def kind(source: str) -> str | None:
    """smiles, sdf, mol or table, by the name of a file; None: it is no name of such a file."""
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return KINDS.get(suffix.lower())


def content(path: Path) -> bytes:
    """The bytes of a file, unpacked if its name ends in .gz.

    Raises:
        OSError, EOFError, zlib.error: it cannot be read. TiltflowError: it is too large, or would be when it is unpacked.
    """
    if path.suffix.lower() != ".gz":
        if path.stat().st_size > MOST:
            raise TiltflowError(f"{path} has more than {MOST >> 20} MiB; split it.")
        return path.read_bytes()
    parts, size = [], 0
    with path.open("rb") as packed, gzip.open(packed) as f:
        while part := f.read(1 << 20):
            parts.append(part)
            size += len(part)
            if size > MOST or (size > FREE and size > RATIO * packed.tell()):
                raise TiltflowError(
                    f"{path} unpacks to more than {size >> 20} MiB from {packed.tell() >> 10} KiB; a file of molecules does "
                    f"not: unpack it yourself, or split it (at most {MOST >> 20} MiB)."
                )
    return b"".join(parts)


def text(path: Path) -> str:
    """A file as text: UTF-8, UTF-16 with its mark, or else Latin-1, in which every byte is a letter.

    Raises:
        TiltflowError: it is missing, damaged or too large.
    """
    try:
        data = content(path)
    except FileNotFoundError as error:
        raise TiltflowError(f"no file {path}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise TiltflowError(f"{path} cannot be read ({error}).") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def lines(whole: str) -> list[str]:
    """The lines of a text, without their ends."""
    return [line.removesuffix("\r") for line in whole.split("\n")]


def rows(path: Path) -> Iterator[Row]:
    """The rows of a table with a column of SMILES; commas, semicolons or tabs, as its first line has them.

    Raises:
        TiltflowError: there is no column whose name says SMILES; as :func:`text`.
    """
    whole = lines(text(path))
    head = whole[0] if whole else ""
    reader = csv.reader((line + "\n" for line in whole), delimiter=max("\t,;", key=head.count), strict=False)
    names = [name.strip() for name in next(reader, [])]
    lower = [name.lower() for name in names]
    column = next((i for i, name in enumerate(lower) if name == "smiles"), None)
    if column is None:
        column = next((i for i, name in enumerate(lower) if "smiles" in name), None)
    if column is None:
        raise TiltflowError(f"{path} has no column SMILES; its first line names {', '.join(names) or 'none'}.")
    called = next((lower.index(name) for name in NAMES if name in lower), None)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise TiltflowError(f"{path}, line {reader.line_num}: no such table ({error}).") from error
        if row is None:
            return
        if len(row) > column and row[column].strip():
            fields = {n: v for i, (n, v) in enumerate(zip(names, row)) if n and v and i not in (column, called)}
            yield Row(reader.line_num, row[column].strip(), "" if called is None else row[called].strip(), fields)
        elif any(cell.strip() for cell in row):
            yield Row(reader.line_num, "", "", {})
