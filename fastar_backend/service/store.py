"""Where snapshots live: any fsspec URL (Redis: redis_store.py). A stream's folder is named by the hash of its token,
which is never stored.

Servers that share a store fence each other. A stream's owner has an epoch, 1 where it began; who takes the stream over
claims the next one by creating `owner.EPOCH`, which holds the chunk it goes on from. A snapshot is named `CHUNK.EPOCH`,
so owners never overwrite each other. Who is not the newest owner cannot write; and what slips in while a newer one
claims is removed by its writer, and void to every reader: it is later than the chunk where the newer owner began.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterable
from typing import Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fastar_backend.errors import FastarError, Superseded, UnknownStream

LARGEST = 8 << 30  # bytes of a snapshot that is read
FIRST_EPOCH = 1  # of a stream that was never taken over
NAME = re.compile(r"(owner|\d+)\.(\d+)")  # of a file in a stream's folder


class StoreError(FastarError):
    """The store cannot be reached, is full, or refuses."""

    code = "UNAVAILABLE"


class Store(Protocol):
    """What the service asks of one: see SnapshotStore."""

    def claim(self, token: str, chunk: int) -> int: ...

    def put(self, token: str, chunk: int, data: bytes, epoch: int = FIRST_EPOCH) -> None: ...

    def chunks(self, token: str) -> list[int]: ...

    def get(self, token: str, chunk: int | None = None) -> tuple[int, bytes]: ...

    def drop(self, token: str, after: int = -1, epoch: int = FIRST_EPOCH) -> None: ...

    def sweep(self) -> None: ...


def open_store(url: str, keep: int, ttl: float) -> Store:
    """By what `url` begins with. Raises StoreError."""
    if not url.startswith(("redis://", "rediss://")):
        return SnapshotStore(url, keep, ttl)
    try:
        from fastar_backend.service.redis_store import RedisStore  # an extra: not every server has its client
    except ImportError:
        raise StoreError("snapshots: no client for Redis; allowed: pip install 'fastar-serve[redis]'") from None
    return RedisStore(url, keep, ttl)


class SnapshotStore:
    """One writer and one reader at a time. Raises StoreError; its text never holds the URL, which may hold secrets."""

    def __init__(self, url: str, keep: int, ttl: float) -> None:
        """url: e.g. /var/lib/fastar, s3://bucket/folder. keep: newest snapshots of each stream. ttl: seconds."""
        self.keep, self.ttl = keep, ttl
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
            self.files.makedirs(self.root, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise StoreError(
                f"snapshots: cannot open the store ({type(error).__name__}); allowed: an fsspec URL"
            ) from None

    def claim(self, token: str, chunk: int) -> int:
        """Takes the stream over from the state before `chunk`: its next epoch, which nobody else gets where the file
        system creates files exclusively (folders do; object stores as far as their fsspec driver does)."""
        folder = self._folder(token)
        with self._errors("write"):
            self.files.makedirs(folder, exist_ok=True)
            snapshots, owners = self._there(token)
            epoch = newest(snapshots, owners)
            while True:
                epoch += 1
                with contextlib.suppress(FileExistsError):
                    self._create(f"{folder}/owner.{epoch}", str(chunk).encode())
                    return epoch

    def put(self, token: str, chunk: int, data: bytes, epoch: int = FIRST_EPOCH) -> None:
        """Whole or not at all: written under another name, then moved. Raises Superseded where `epoch` is not the
        newest: another owner's snapshots stay as they are."""
        folder = self._folder(token)
        temporary, name = f"{folder}/.{secrets.token_hex(8)}", f"{folder}/{chunk}.{epoch}"
        with self._errors("write"):
            self.files.makedirs(folder, exist_ok=True)
            self._check_owner(token, epoch)
            try:
                self.files.pipe_file(temporary, data)
                self.files.mv(temporary, name)
            except Exception:
                with contextlib.suppress(Exception):
                    self.files.rm_file(temporary)
                raise
            try:
                self._check_owner(token, epoch)
            except Superseded:
                self.files.rm_file(name)
                raise
            valid = self._valid(token)
            keep = {(number, valid[number]) for number in sorted(valid)[-self.keep :]}
            for number, of in self._there(token)[0]:
                if (number, of) not in keep and of <= epoch:
                    self.files.rm_file(f"{folder}/{number}.{of}")

    def chunks(self, token: str) -> list[int]:
        """Numbers of the chunks before which there is a snapshot, ascending."""
        with self._errors("list"):
            return sorted(self._valid(token))

    def get(self, token: str, chunk: int | None = None) -> tuple[int, bytes]:
        """The named one, else the newest. Raises UnknownStream too."""
        with self._errors("list"):
            there = self._valid(token)
        if not there or chunk is not None and chunk not in there:
            raise not_there(there)
        number = max(there) if chunk is None else chunk
        with self._errors("read"):
            path = f"{self._folder(token)}/{number}.{there[number]}"
            if self.files.size(path) > LARGEST:
                raise StoreError(f"snapshot: larger than {LARGEST} bytes; allowed: less")
            return number, self.files.cat_file(path)

    def drop(self, token: str, after: int = -1, epoch: int = FIRST_EPOCH) -> None:
        """Those of chunks after `after`; all, if it is -1. Raises Superseded where `epoch` is not the newest."""
        with self._errors("remove"):
            self._check_owner(token, epoch)
            for number, of in self._there(token)[0]:
                if number > after and of <= epoch:
                    self.files.rm_file(f"{self._folder(token)}/{number}.{of}")

    def sweep(self) -> None:
        """Removes what is older than `ttl`."""
        with self._errors("sweep"):
            self.files.invalidate_cache(self.root)
            for folder in self.files.ls(self.root, detail=False):
                paths = self.files.ls(folder, detail=False) if self.files.isdir(folder) else []
                old = [path for path in paths if self._age(path) > self.ttl]
                for path in old:
                    self.files.rm_file(path)
                if paths and len(old) == len(paths):
                    with contextlib.suppress(OSError):
                        self.files.rmdir(folder)

    def _there(self, token: str) -> tuple[list[tuple[int, int]], list[int]]:
        """(chunk, epoch) of every snapshot; the epochs that were claimed."""
        folder = self._folder(token)
        self.files.invalidate_cache(folder)
        if not self.files.isdir(folder):
            return [], []
        names = (path.rpartition("/")[2] for path in self.files.ls(folder, detail=False))
        found = [(match[1], int(match[2])) for name in names if (match := NAME.fullmatch(name))]
        return [(int(what), epoch) for what, epoch in found if what != "owner"], [e for w, e in found if w == "owner"]

    def _valid(self, token: str) -> dict[int, int]:
        """chunk -> epoch of the snapshots that are not void."""
        snapshots, owners = self._there(token)
        began = {}
        for owner in owners:
            text = self.files.cat_file(f"{self._folder(token)}/owner.{owner}")
            if text:  # else it is being written: its snapshots are still to come
                began[owner] = int(text)
        of = [(n, epoch) for n, epoch in snapshots if all(n <= at for owner, at in began.items() if owner > epoch)]
        return dict(sorted(of))  # of one chunk the newest epoch's

    def _check_owner(self, token: str, epoch: int) -> None:
        if newest(*self._there(token)) > epoch:
            raise superseded()

    def _create(self, path: str, data: bytes) -> None:
        """Raises FileExistsError."""
        if isinstance(self.files, LocalFileSystem):
            with open(path, "xb") as file:
                file.write(data)
        else:
            self.files.pipe_file(path, data, mode="create")

    def _age(self, path: str) -> float:
        return time.time() - self.files.modified(path).timestamp()

    def _folder(self, token: str) -> str:
        return f"{self.root}/{hashlib.sha256(token.encode()).hexdigest()}"

    @contextlib.contextmanager
    def _errors(self, what: str):
        try:
            yield
        except FastarError:
            raise
        except Exception as error:  # every filesystem raises its own
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise StoreError(f"snapshots: cannot {what} ({reason}); allowed: a store that works") from None


def superseded() -> Superseded:
    return Superseded("snapshot: its stream was taken over by another server; allowed: the newest owner's")


def not_there(there: Iterable[int]) -> UnknownStream:
    numbers = ", ".join(map(str, sorted(there)))
    return UnknownStream(f"snapshot: not there; allowed: {numbers or 'none is stored'}")


def newest(snapshots: list[tuple[int, int]], owners: list[int]) -> int:
    """The epoch of the stream's newest owner; snapshots count too, as files older than `ttl` are swept."""
    return max([FIRST_EPOCH, *owners, *(epoch for _, epoch in snapshots)])
