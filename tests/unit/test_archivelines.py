"""Folders of owners, and hashes as lines of JSON."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from hashlib import sha256

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from redismem.archivefiles import leftovers, owner_folder, runs_of
from redismem.archivelines import Copy, Draft, Line, Manifest, line_of
from redismem.archiverun import quarter_number, records
from redismem.errors import ArchiveDamaged, InvalidInput
from redismem.keys import Owner

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256)


@given(st.lists(st.tuples(names, names | st.just("")), min_size=2, unique=True))
def test_each_owner_has_a_folder_that_is_safe_and_no_one_elses(parts: list[tuple[str, str]]) -> None:
    folders = [owner_folder(Owner(user, namespace)) for user, namespace in parts]
    assert len({folder.lower() for folder in folders}) == len(parts)
    for folder in folders:
        assert len(folder) <= 255
        assert set(folder) <= set("abcdefghijklmnopqrstuvwxyzABCDEF0123456789-_%~")


@given(names, st.dictionaries(names, st.binary(max_size=50), min_size=1), names)
def test_a_line_holds_every_byte_of_a_hash(memory_id: str, fields: dict[str, bytes], previous: str) -> None:
    fields["embedding"] = b"1234"
    raw = [part for name, value in fields.items() for part in (name.encode(), value)]
    line = line_of(b"embedding", memory_id.encode(), previous.encode(), b"hash", raw)
    assert line is not None
    read = msgspec.json.decode(msgspec.json.encode(line), type=Line)
    head, flat = records([read])[:5], records([read])[5:]
    assert head == [memory_id, previous, "hash", "embedding", len(fields)]
    values = {
        str(name): value.encode() if isinstance(value, str) else value
        for name, value in zip(flat[::2], flat[1::2], strict=True)
    }
    assert values == fields
    assert "embedding" in read.binary


def test_what_json_cannot_name_has_no_line() -> None:
    assert line_of(b"embedding", b"\xff", b"", b"", [b"text", b"x"]) is None
    assert line_of(b"embedding", b"id", b"", b"", [b"\xff", b"x"]) is None


def test_a_quarter_has_a_number() -> None:
    assert [quarter_number(name) for name in ("2024-Q1", "2024-Q4", "0001-Q1")] == [8096, 8099, 4]
    for wrong in (
        "2024-Q0",
        "2024-Q5",
        "24-Q1",
        "2024-Q11",
        "2024-q1",
        "²024-Q1",
        " 2024-Q1",
        "2024-Q1\n",
        "",
    ):
        with pytest.raises(InvalidInput):
            quarter_number(wrong)


def test_leftovers_are_files_without_a_manifest() -> None:
    run = "0" * 15
    ours = [f"2024-Q1.{run}{i}{end}" for i, end in enumerate((".jsonl.zst", ".json.0a1b2c3d.part", ".json"))]
    whole = [f"2024-Q2.{run}1.jsonl.zst", f"2024-Q2.{run}1.json"]
    foreign = ["notes.txt", "2024-Q1.json", "2024-Q1.jsonl.zst", f"2024-Q1.{run}g.json"]
    assert leftovers([*ours, *whole, *foreign]) == ours[:2]
    assert runs_of([*ours, *whole, *foreign], "2024-Q1") == {name: i for i, name in enumerate(ours)}


def manifest_of(packed: bytes, count: int) -> Manifest:
    return Manifest(
        owner="a",
        quarter="2024-Q1",
        run=1,
        file="2024-Q1.1.jsonl.zst",
        count=count,
        sha256=sha256(packed).hexdigest(),
        bytes=len(packed),
        embedder="e",
        dim=2,
        created=datetime.now(UTC),
    )


def test_a_file_reads_as_it_was_written_as_often_as_asked() -> None:
    class Kept(io.BytesIO):
        def close(self) -> None:
            self.packed = self.getvalue()

    file = Kept()
    draft = Draft(file, "name")
    lines = [Line(f"m{i}", "embedding", {"text": "word " * i}) for i in range(1000)]
    draft.add(lines[:10])
    draft.add([])
    draft.add(lines[10:])
    draft.close()
    assert (draft.count, draft.bytes) == (1000, len(file.packed))
    copy = Copy.verified(io.BytesIO(file.packed), manifest_of(file.packed, 1000))
    for _ in range(2):
        assert [line for part in copy.parts() for line in part] == lines
    assert max(len(part) for part in copy.parts()) == 64
    copy.close()


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (b'{"id":"a","vector":"e","fields":{}}\n', 2),
        (b'{"id":"a","vector":"e","fields":{}}\n' * 2, 1),
        (b'{"id":"a"}\n', 1),
        (b"not JSON\n", 1),
        (b'{"id":"a","vector":"e","fields":{}', 1),
    ],
)
def test_a_file_that_is_not_what_its_manifest_says_is_damaged(lines: bytes, count: int) -> None:
    packed = zstandard.compress(lines)
    copy = Copy.verified(io.BytesIO(packed), manifest_of(packed, count))
    with pytest.raises(ArchiveDamaged):
        copy.check()
    copy.close()


def test_a_frame_that_was_cut_off_is_damaged() -> None:
    packed = zstandard.compress(b'{"id":"a","vector":"e","fields":{}}\n' * 1000)[:-5]
    copy = Copy.verified(io.BytesIO(packed), manifest_of(packed, 1000))
    with pytest.raises(ArchiveDamaged):
        copy.check()
    copy.close()
