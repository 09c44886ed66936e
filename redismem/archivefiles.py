"""The only place that knows fsspec, and how the files of an archive lie. Knows no Redis.

    store.json                              the store whose archive this is
    <owner>/<quarter>.<run>.jsonl.zst       memories of a quarter
    <owner>/<quarter>.<run>.json            its manifest

Invariants:
    A file belongs to the archive from the moment its manifest is there; before, it is a leftover. Neither is
    ever changed, so whoever is late can spoil nothing: a quarter with more than one file is their union, and
    what two of them have, the one of the later run has anew.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from redismem.archivelines import DATA, MANIFEST, Copy, Draft, Manifest, reaching
from redismem.errors import ArchiveDamaged, Misconfigured
from redismem.keys import Owner

_MARKER = "store.json"
_OURS = re.compile(r"(\d{4}-Q[1-4])\.([0-9a-f]{16})(?:\.jsonl\.zst|\.json|\.json\.[0-9a-f]{8}\.part)")

_SAFE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
#: characters of a folder's name that are kept; file systems allow 255 in all
_FOLDER_LENGTH = 200


def owner_folder(owner: Owner) -> str:
    """Return the folder of an owner: another one for each, also where upper and lower case are one."""
    name = "".join(char if char in _SAFE else f"%{ord(char):02x}" for char in owner.tag)
    if len(name) <= _FOLDER_LENGTH:
        return name
    return f"{name[:_FOLDER_LENGTH]}~{blake2b(owner.tag.encode(), digest_size=16).hexdigest()}"


def file_name(quarter: str, run: int) -> str:
    """Return the name of a file of memories."""
    return f"{quarter}.{run:016x}{DATA}"


def runs_of(names: Sequence[str], quarter: str = "") -> dict[str, int]:
    """Return the run of each file that is of an archive, and of the quarter."""
    return {
        name: int(match[2], 16)
        for name in names
        if (match := _OURS.fullmatch(name)) and quarter in ("", match[1])
    }


def leftovers(names: Sequence[str]) -> list[str]:
    """Return the files of an archive that no manifest names."""
    ours = runs_of(names)
    return [
        name for name in ours if not (name.endswith(MANIFEST) or name.removesuffix(DATA) + MANIFEST in ours)
    ]


class Files:
    """The archive of one store."""

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root
        self._is_local = isinstance(system, LocalFileSystem)

    @classmethod
    def opened(cls, url: str, store: str) -> Files:
        """Return the archive at a directory or fsspec URL, which belongs to `store` from then on.

        Raises:
            Misconfigured: the URL cannot be used, or another store archives there.
            Unavailable: it cannot be reached.
        """
        try:
            files = cls(*url_to_fs(url))
        except (ImportError, ValueError) as exc:
            raise Misconfigured(f"REDISMEM_ARCHIVE_URL cannot be used: {exc}", field="archive_url") from exc
        with reaching(_MARKER):
            files._claim(store)
        return files

    def _claim(self, store: str) -> None:
        path = f"{self._root}/{_MARKER}"
        try:
            raw: bytes = self._system.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            try:
                self._make(self._root)
                raw = self._put(path, msgspec.json.encode({"store": store}))
            except OSError as exc:
                raise Misconfigured(
                    f"REDISMEM_ARCHIVE_URL cannot be written to: {exc}", field="archive_url"
                ) from exc
        if msgspec.json.decode(raw, type=dict[str, str]).get("store") != store:
            raise Misconfigured(
                "REDISMEM_ARCHIVE_URL is the archive of another store: give each store a place of its own",
                field="archive_url",
            )

    def names(self, owner: Owner) -> list[str]:
        """Return the names of all files of an owner, leftovers too."""
        with reaching("an owner's folder"):
            self._system.invalidate_cache()
            try:
                paths = self._system.ls(self._folder(owner), detail=False)
            except FileNotFoundError:
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def manifests(self, owner: Owner, names: Sequence[str], quarter: str = "") -> list[Manifest]:
        """Return the manifests among these files: quarters in order, the newest run of each first.

        Args:
            quarter: only those of this one.

        Cost: reads each.

        Raises:
            ArchiveDamaged: one cannot be read, or is not this owner's.
        """
        found = []
        for name in runs_of(names, quarter):
            if not name.endswith(MANIFEST):
                continue
            with reaching(name):
                try:
                    raw = self._system.cat_file(self._path(owner, name))
                except FileNotFoundError:
                    continue  # another run removed it meanwhile
                manifest = msgspec.json.decode(raw, type=Manifest)
            file = file_name(manifest.quarter, manifest.run)
            if (manifest.owner, manifest.file, manifest.name) != (owner.tag, file, name):
                raise ArchiveDamaged(f"{name} is the manifest of another owner or file; it must not lie here")
            found.append(manifest)
        return sorted(found, key=lambda manifest: (manifest.quarter, -manifest.run))

    def draft(self, owner: Owner, quarter: str, run: int) -> Draft:
        """Begin a file."""
        name = file_name(quarter, run)
        with reaching(name):
            self._make(self._folder(owner))
            return Draft(self._system.open(self._path(owner, name), "wb"), name)

    def finished(self, owner: Owner, draft: Draft, *, embedder: str, dim: int) -> Manifest:
        """Complete a draft; return its manifest, which is not written yet."""
        with reaching(draft.name):
            draft.close()
            self._sync(self._path(owner, draft.name))
        quarter, run = draft.name.removesuffix(DATA).split(".")
        return Manifest(
            owner=owner.tag,
            quarter=quarter,
            run=int(run, 16),
            file=draft.name,
            count=draft.count,
            sha256=draft.sha256,
            bytes=draft.bytes,
            embedder=embedder,
            dim=dim,
            created=datetime.now(UTC),
        )

    def save(self, owner: Owner, manifest: Manifest) -> None:
        """Write a manifest: from here on its file is part of the archive."""
        payload = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        with reaching(manifest.name):
            if self._put(self._path(owner, manifest.name), payload) != payload:
                raise ArchiveDamaged(f"{manifest.name} reads otherwise than it was written")

    def copy(self, owner: Owner, manifest: Manifest) -> Copy:
        """Return a verified copy of a file, on this machine; close it.

        Raises:
            ArchiveDamaged: the file is missing or altered.
        """
        with reaching(manifest.file), self._system.open(self._path(owner, manifest.file), "rb") as file:
            return Copy.verified(file, manifest)

    def remove(self, owner: Owner, names: Sequence[str]) -> None:
        """Remove files, manifests first; it is no failure if one is gone."""
        with reaching("an owner's folder"):
            for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):
                with suppress(FileNotFoundError):
                    self._system.rm_file(self._path(owner, name))
            if self._is_local:
                with suppress(OSError):  # it goes with its last file
                    self._system.rmdir(self._folder(owner))

    def _folder(self, owner: Owner) -> str:
        return f"{self._root}/{owner_folder(owner)}"

    def _path(self, owner: Owner, name: str) -> str:
        return f"{self._folder(owner)}/{name}"

    def _make(self, folder: str) -> None:
        is_new = self._is_local and not self._system.exists(folder)
        self._system.makedirs(folder, exist_ok=True)
        if is_new:
            Path(folder).chmod(0o700)  # memories are private
            self._sync(str(Path(folder).parent))

    def _put(self, path: str, payload: bytes) -> bytes:
        """Write a small file so that nobody sees half of it; return what is then read."""
        part = f"{path}.{secrets.token_hex(4)}.part"
        self._system.pipe_file(part, payload)
        self._sync(part)
        self._system.mv(part, path)
        self._sync(path.rpartition("/")[0])
        raw: bytes = self._system.cat_file(path)
        return raw

    def _sync(self, path: str) -> None:
        """Return when a power cut cannot undo it; object stores answer only then anyway."""
        if self._is_local and os.name == "posix":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
