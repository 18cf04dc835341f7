"""Where snapshots live: any fsspec URL. A stream's folder is named by the hash of its token, which is never stored."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time

import fsspec

from fastar_backend.errors import FastarError, UnknownStream

LARGEST = 8 << 30  # bytes of a snapshot that is read


class StoreError(FastarError):
    """The store cannot be reached, is full, or refuses."""

    code = "UNAVAILABLE"


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

    def put(self, token: str, chunk: int, data: bytes) -> None:
        """Whole or not at all: written under another name, then moved."""
        folder = self._folder(token)
        temporary = f"{folder}/.{secrets.token_hex(8)}"
        with self._errors("write"):
            self.files.makedirs(folder, exist_ok=True)
            try:
                self.files.pipe_file(temporary, data)
                self.files.mv(temporary, f"{folder}/{chunk}")
            except Exception:
                with contextlib.suppress(Exception):
                    self.files.rm_file(temporary)
                raise
            for number in self.chunks(token)[: -self.keep]:
                self.files.rm_file(f"{folder}/{number}")

    def chunks(self, token: str) -> list[int]:
        """Numbers of the chunks before which there is a snapshot, ascending."""
        with self._errors("list"):
            folder = self._folder(token)
            self.files.invalidate_cache(folder)
            if not self.files.isdir(folder):
                return []
            names = (path.rpartition("/")[2] for path in self.files.ls(folder, detail=False))
            return sorted(int(name) for name in names if name.isdecimal())

    def get(self, token: str, chunk: int | None = None) -> tuple[int, bytes]:
        """The named one, else the newest. Raises UnknownStream too."""
        there = self.chunks(token)
        if not there or chunk is not None and chunk not in there:
            raise UnknownStream(f"snapshot: not there; allowed: {', '.join(map(str, there)) or 'none is stored'}")
        number = there[-1] if chunk is None else chunk
        with self._errors("read"):
            path = f"{self._folder(token)}/{number}"
            if self.files.size(path) > LARGEST:
                raise StoreError(f"snapshot: larger than {LARGEST} bytes; allowed: less")
            return number, self.files.cat_file(path)

    def drop(self, token: str, after: int = -1) -> None:
        """Those of chunks after `after`; all, if it is -1."""
        with self._errors("remove"):
            for number in self.chunks(token):
                if number > after:
                    self.files.rm_file(f"{self._folder(token)}/{number}")

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
