"""The only place that knows zstandard and what stands in an archive's files: JSON lines, and a manifest.

Nothing is read from a file whose sha256 is not the manifest's. Everything here but `line_of` blocks: call it
in a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import sha256
from io import BufferedReader
from tempfile import SpooledTemporaryFile
from typing import IO, Any

import msgspec
import zstandard

from redismem.errors import ArchiveDamaged, RedisMemError, Unavailable
from redismem.keys import VECTOR_FIELDS

DATA, MANIFEST = ".jsonl.zst", ".json"

#: the default of zstd; vectors do not compress, and for text more effort gains 5 % at a tenth of the speed
_LEVEL = 3

#: memories handled together, so that a call holds Redis for under 10 ms; fewer after so many bytes
PART = 64
_PART_BYTES = 512 * 1024

_CHUNK = 1024 * 1024
#: compressed bytes of a file that are held in memory; more go to a temporary file
_HELD_BYTES = 16 * 1024 * 1024


class Line(msgspec.Struct, omit_defaults=True):
    """A memory's hash, whole. JSON writes what is binary as base64.

    `vector`: the field that holds the vector that served. `prev`, `prev_hash`: id and content of the turn
    before, which that vector was made from as well.
    """

    id: str
    vector: str
    fields: dict[str, str]
    binary: dict[str, bytes] = {}
    prev: str = ""
    prev_hash: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a file part of the archive. `owner` is the tag of its keys, `bytes` the compressed size."""

    owner: str
    quarter: str
    run: int
    file: str
    count: int
    sha256: str
    bytes: int
    embedder: str
    dim: int
    created: datetime
    version: int = 1

    @property
    def name(self) -> str:
        return self.file.removesuffix(DATA) + MANIFEST


def line_of(
    vector: bytes, memory_id: bytes, prev: bytes, prev_hash: bytes, raw: Sequence[bytes]
) -> Line | None:
    """Return the line of a hash; None when JSON cannot hold its names.

    Args:
        raw: name, value, name, value …
    """
    fields: dict[str, str] = {}
    binary: dict[str, bytes] = {}
    try:
        for name, value in zip((part.decode() for part in raw[::2]), raw[1::2], strict=True):
            try:
                if name in VECTOR_FIELDS:
                    binary[name] = value
                else:
                    fields[name] = value.decode()
            except UnicodeDecodeError:
                binary[name] = value
        return Line(memory_id.decode(), vector.decode(), fields, binary, prev.decode(), prev_hash.decode())
    except UnicodeDecodeError:
        return None


class Draft:
    """A file that is being written; `close` it, or `abandon` it and leave the rest to `Files.remove`."""

    def __init__(self, file: Any, name: str) -> None:
        self.name = name
        self.count = 0
        self.bytes = 0
        self._file = file
        self._digest = sha256()
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
        self._encode = msgspec.json.Encoder().encode
        # a cancelled caller may abandon it while its thread still adds
        self._lock = threading.Lock()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, lines: Sequence[Line]) -> None:
        """Append memories."""
        with self._lock, reaching(self.name):
            encoded = b"".join([self._encode(line) + b"\n" for line in lines])
            self._write(self._compressor.compress(encoded))
            self.count += len(lines)

    def close(self) -> None:
        """Write what is left and close the file."""
        with self._lock:
            self._write(self._compressor.flush())
            self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        with self._lock, suppress(Exception):  # it failed before, or nobody wants it
            self._file.close()

    def __del__(self) -> None:
        self.abandon()  # whoever was cancelled while a thread opened it never got it

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self.bytes += len(data)
        self._file.write(data)


class Copy:
    """A verified file on this machine."""

    def __init__(self, held: IO[bytes], manifest: Manifest) -> None:
        self._file = held
        self._manifest = manifest

    @classmethod
    def verified(cls, file: Any, manifest: Manifest) -> Copy:
        """Return a copy of an open file; close it.

        Raises:
            ArchiveDamaged: its sha256 is not the manifest's.
        """
        digest = sha256()
        held = SpooledTemporaryFile(_HELD_BYTES)  # noqa: SIM115  # the copy closes it
        try:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                held.write(chunk)
        except BaseException:
            held.close()
            raise
        if digest.hexdigest() != manifest.sha256:
            held.close()
            raise ArchiveDamaged(f"{manifest.file} is not the file of its manifest: sha256 differs")
        return cls(held, manifest)

    def parts(self) -> Iterator[list[Line]]:
        """Yield all lines, in parts that one call to Redis takes; may be called again.

        Raises:
            ArchiveDamaged: a line cannot be decoded, or there are not as many as the manifest says.
        """
        decode = msgspec.json.Decoder(Line).decode
        part: list[Line] = []
        count = size = 0
        self._file.seek(0)
        with reaching(self._manifest.file):
            reader = zstandard.ZstdDecompressor().stream_reader(self._file, closefd=False)
            for raw in BufferedReader(reader, _CHUNK):
                part.append(decode(raw))
                count, size = count + 1, size + len(raw)
                if len(part) == PART or size >= _PART_BYTES:
                    yield part
                    part, size = [], 0
        if count != self._manifest.count:
            raise ArchiveDamaged(f"{self._manifest.file} has not the number of memories of its manifest")
        if part:
            yield part

    def check(self) -> None:
        """Decode every line; see `parts`."""
        for _ in self.parts():
            pass

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        self.close()  # see `Draft`


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turn what a file system may raise into our errors, from exc."""
    try:
        yield
    except RedisMemError:
        raise
    except FileNotFoundError as exc:
        raise ArchiveDamaged(f"the archive misses {what}") from exc
    except (zstandard.ZstdError, msgspec.DecodeError) as exc:
        raise ArchiveDamaged(f"{what} cannot be decoded: {exc}") from exc
    except Exception as exc:  # each file system behind fsspec has errors of its own
        raise Unavailable(f"the archive cannot be reached ({what}): {type(exc).__name__}: {exc}") from exc
