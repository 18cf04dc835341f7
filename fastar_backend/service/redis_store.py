"""Snapshots in Redis (or what speaks its protocol): `redis://[user:password@]host:port[/db]`, `rediss://` with TLS.

A stream has one hash, `fastar:{HASH OF ITS TOKEN}`: its newest owner's `epoch` and, by chunk number, where the snapshot
taken before that chunk lies. The bytes are keys of their own, in parts, as Redis holds 512 MB in a key. Parts are
written first, unseen; then one script checks the owner, names them in the hash and forgets what is too old. Scripts run
whole and alone, so that, unlike in folders, nothing slips in between. Redis removes by itself what has lived for `ttl`:
also parts that a writer left behind which died.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import secrets

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from fastar_backend.errors import FastarError
from fastar_backend.service.store import FIRST_EPOCH, LARGEST, StoreError, not_there, superseded

PART = 64 << 20  # bytes of a snapshot in one key
GRACE = 600  # seconds that parts outlive their entry in the hash: who has read it can still read them
CONNECT, ANSWER = 5.0, 30.0  # seconds to wait for a connection; for an answer, of a whole part
# Each script gets the hash as KEYS[1], and returns flat lists: first 1, or 0 where `epoch` is not the newest; then "ID
# PARTS" of what is no longer named. An entry: "ID PARTS BYTES UNTIL", UNTIL in seconds since 1970 on Redis' clock.
COMMON = """
local function newest() return tonumber(redis.call('HGET', KEYS[1], 'epoch') or '1') end
local function entries()
  local all, found = redis.call('HGETALL', KEYS[1]), {}
  for i = 1, #all, 2 do
    if all[i] ~= 'epoch' then table.insert(found, {tonumber(all[i]), all[i + 1]}) end
  end
  table.sort(found, function(a, b) return a[1] < b[1] end)
  return found
end
local function forget(entry, gone)
  redis.call('HDEL', KEYS[1], string.format('%d', entry[1]))
  table.insert(gone, string.match(entry[2], '^%S+ %S+'))
end
local function forget_after(chunk, gone)
  for _, entry in ipairs(entries()) do
    if entry[1] > chunk then forget(entry, gone) end
  end
end
"""
CLAIM = """
local gone, epoch = {}, newest() + 1
forget_after(tonumber(ARGV[1]), gone)
redis.call('HSET', KEYS[1], 'epoch', epoch)
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {epoch, unpack(gone)}
"""
PUT = """
local epoch, chunk, keep, ttl = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if newest() > epoch then return {0} end
local gone, same = {}, redis.call('HGET', KEYS[1], chunk)
if same then forget({tonumber(chunk), same}, gone) end
local till = tonumber(redis.call('TIME')[1]) + ttl
redis.call('HSET', KEYS[1], 'epoch', epoch, chunk, ARGV[5] .. ' ' .. string.format('%d', till))
local found = entries()
for i = 1, #found - keep do forget(found[i], gone) end
redis.call('EXPIRE', KEYS[1], ttl)
return {1, unpack(gone)}
"""
DROP = """
if newest() > tonumber(ARGV[1]) then return {0} end
local gone = {}
forget_after(tonumber(ARGV[2]), gone)
return {1, unpack(gone)}
"""
LIST = """
local now, live = tonumber(redis.call('TIME')[1]), {}
for _, entry in ipairs(entries()) do
  if tonumber(string.match(entry[2], '%d+$')) > now then
    table.insert(live, entry[1])
    table.insert(live, entry[2])
  end
end
return live
"""
REASONS = [  # the first that fits
    (redis.exceptions.AuthenticationError, "it refuses our password"),
    (redis.exceptions.NoPermissionError, "it does not permit it"),
    (redis.exceptions.OutOfMemoryError, "it is full"),
    (redis.exceptions.ReadOnlyError, "it is a read-only replica"),
    (redis.exceptions.TimeoutError, "no answer in time"),
    (redis.exceptions.ConnectionError, "it cannot be reached"),
]


class RedisStore:
    """As SnapshotStore. Raises StoreError; its text never holds the URL, nor what Redis said."""

    def __init__(self, url: str, keep: int, ttl: float) -> None:
        """Raises StoreError where Redis does not answer. keep: newest snapshots of each stream. ttl: seconds."""
        self.keep, self.ttl = keep, math.ceil(ttl)
        with self._errors("open the store", "redis://[user:password@]host:port[/db] of a Redis that answers"):
            self.redis = redis.Redis.from_url(
                url, socket_connect_timeout=CONNECT, socket_timeout=ANSWER, health_check_interval=30,
                retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), 3, (redis.exceptions.ConnectionError,)),
            )  # fmt: skip
            scripts = {"claim": CLAIM, "put": PUT, "drop": DROP, "list": LIST}
            self._scripts = {name: self.redis.register_script(COMMON + text) for name, text in scripts.items()}
            self.redis.ping()

    def claim(self, token: str, chunk: int) -> int:
        """Takes the stream over from the state before `chunk`: its next epoch, which nobody else gets. Later snapshots
        are gone."""
        with self._errors("write"):
            epoch, *gone = self._run("claim", token, chunk, self.ttl)
            self._remove(token, gone)
            return epoch

    def put(self, token: str, chunk: int, data: bytes, epoch: int = FIRST_EPOCH) -> None:
        """Whole or not at all. Raises Superseded where `epoch` is not the newest: another owner's stay as they are."""
        if len(data) > LARGEST:
            raise StoreError(f"snapshot: {len(data)} bytes; allowed: at most {LARGEST}")
        with self._errors("write"):
            if int(self.redis.hget(key(token), "epoch") or FIRST_EPOCH) > epoch:  # before gigabytes go out in vain
                raise superseded()
            name, parts = secrets.token_hex(8), range(math.ceil(len(data) / PART))
            ours = f"{name} {len(parts)}"
            try:
                view = memoryview(data)
                for index in parts:
                    part = view[index * PART : (index + 1) * PART]
                    self.redis.set(part_key(token, name, index), part, ex=self.ttl + GRACE)
                kept, *gone = self._run("put", token, epoch, chunk, self.keep, self.ttl, f"{ours} {len(data)}")
                if not kept:
                    raise superseded()
            except Exception:
                with contextlib.suppress(redis.RedisError):
                    self._remove(token, [ours.encode()])
                raise
            self._remove(token, gone)

    def chunks(self, token: str) -> list[int]:
        """Numbers of the chunks before which there is a snapshot, ascending."""
        with self._errors("list"):
            return sorted(self._entries(token))

    def get(self, token: str, chunk: int | None = None) -> tuple[int, bytes]:
        """The named one, else the newest. Raises UnknownStream too."""
        with self._errors("list"):
            there = self._entries(token)
        if not there or chunk is not None and chunk not in there:
            raise not_there(there)
        number = max(there) if chunk is None else chunk
        name, parts, size, _ = there[number].decode().split()
        if int(size) > LARGEST:
            raise StoreError(f"snapshot: larger than {LARGEST} bytes; allowed: less")
        with self._errors("read"):
            found = (self.redis.get(part_key(token, name, index)) for index in range(int(parts)))
            data = b"".join(part or b"" for part in found)
        if len(data) != int(size):  # replaced meanwhile, or evicted
            raise StoreError("snapshot: gone while it was read; allowed: a Redis that evicts nothing (noeviction)")
        return number, data

    def drop(self, token: str, after: int = -1, epoch: int = FIRST_EPOCH) -> None:
        """Those of chunks after `after`; all, if it is -1. Raises Superseded where `epoch` is not the newest."""
        with self._errors("remove"):
            ours, *gone = self._run("drop", token, epoch, after)
            if not ours:
                raise superseded()
            self._remove(token, gone)

    def sweep(self) -> None:
        """Nothing is left to do: Redis removes what is older than `ttl`."""

    def _entries(self, token: str) -> dict[int, bytes]:
        flat = self._run("list", token)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def _run(self, script: str, token: str, *arguments: object) -> list:
        return self._scripts[script](keys=[key(token)], args=list(arguments))

    def _remove(self, token: str, gone: list[bytes]) -> None:
        """gone: "ID PARTS" of each."""
        names = [text.decode().split() for text in gone]
        keys = [part_key(token, name, index) for name, parts in names for index in range(int(parts))]
        if keys:
            self.redis.unlink(*keys)

    @contextlib.contextmanager
    def _errors(self, what: str, allowed: str = "a Redis that works"):
        try:
            yield
        except FastarError:
            raise
        except Exception as error:
            known = next((reason for kind, reason in REASONS if isinstance(error, kind)), type(error).__name__)
            raise StoreError(f"snapshots: cannot {what} ({known}); allowed: {allowed}") from None


def key(token: str) -> str:
    return f"fastar:{{{hashlib.sha256(token.encode()).hexdigest()}}}"


def part_key(token: str, name: str, index: int) -> str:
    return f"{key(token)}:{name}:{index}"
