"""Snapshots in a real Redis: as in a folder, atomic, bounded in time and size, and without secrets in what is said."""

from __future__ import annotations

import concurrent.futures
import sys
import time

import pytest
from running_redis import PASSWORD, running_redis
from store_histories import looks_as_in_a_folder, said

from fastar_backend.errors import Superseded, UnknownStream
from fastar_backend.service import redis_store
from fastar_backend.service.redis_store import RedisStore
from fastar_backend.service.store import StoreError, open_store

FREE_PORT = "127.0.0.1:1"  # nobody listens there


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def store(server):
    store = open_store(server.url, keep=2, ttl=3600)
    assert isinstance(store, RedisStore)
    yield store
    store.redis.flushall()
    store.redis.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_history_looks_as_in_a_folder(store, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(redis_store, "PART", 7)
    looks_as_in_a_folder(store, tmp_path, seed)
    assert len(store.redis.keys("fastar:*:*")) <= 2 * 6, "what is not named any more is gone"


def test_two_at_once_get_two_epochs_and_the_late_writer_leaves_nothing(server, store, monkeypatch):
    monkeypatch.setattr(redis_store, "PART", 1000)
    stores = [open_store(server.url, keep=2, ttl=3600) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for turn in range(12):
            token = f"token {turn}"
            store.put(token, 5, b"five")
            writes = [pool.submit(said, store.put, token, 6 + n, b"x" * 2500) for n in range(8)]
            claims = [pool.submit(one.claim, token, 5) for one in stores]
            assert sorted(claim.result() for claim in claims) == list(range(2, 10))
            late = {write.result() and write.result()[0] for write in writes}
            assert late <= {None, Superseded}
            assert set(store.chunks(token)) <= {5}, "what the old owner wrote after is nobody's past"
    for one in stores:
        one.redis.close()
    assert len(store.redis.keys("fastar:*:*:*")) <= 12, "no part of a late write is left"


def test_a_late_writer_is_told_before_and_after_it_has_written(store, monkeypatch):
    store.put("token", 1, b"one")
    script, real = store._scripts["put"], store._scripts["put"]

    def overtaken(**values):
        store.claim("token", 1)
        return real(**values)

    monkeypatch.setitem(store._scripts, "put", overtaken)
    with pytest.raises(Superseded, match="taken over"):
        store.put("token", 2, b"two")
    monkeypatch.setitem(store._scripts, "put", lambda **_: pytest.fail("the bytes need not even go out"))
    with pytest.raises(Superseded, match="taken over"):
        store.put("token", 2, b"two")
    monkeypatch.setitem(store._scripts, "put", script)
    assert store.chunks("token") == [1]
    assert len(store.redis.keys("*")) == 2


def test_everything_has_a_time_to_live(server):
    store = open_store(server.url, keep=2, ttl=2)
    store.put("token", 1, b"one")
    store.claim("claimed only", 3)
    assert all(0 < store.redis.ttl(key) <= 2 + redis_store.GRACE for key in store.redis.keys("*"))
    time.sleep(1.2)
    store.put("token", 2, b"two")
    time.sleep(0.9)
    assert store.chunks("token") == [2], "of a stream that lives on, too"
    with pytest.raises(UnknownStream, match="allowed: 2"):
        store.get("token", 1)
    assert store.get("token") == (2, b"two")
    time.sleep(1.5)
    assert store.chunks("token") == []
    assert [key for key in store.redis.keys("*") if key.count(b":") == 1] == []
    store.redis.flushall()
    store.redis.close()


def test_sizes(store, monkeypatch):
    monkeypatch.setattr(redis_store, "LARGEST", 10)
    store.put("token", 1, b"x" * 10)
    with pytest.raises(StoreError, match="11 bytes; allowed: at most 10"):
        store.put("token", 2, b"x" * 11)
    monkeypatch.setattr(redis_store, "LARGEST", 9)
    with pytest.raises(StoreError, match="larger than 9 bytes"):
        store.get("token")


def test_what_is_evicted_is_not_read_as_whole(store):
    store.put("token", 1, b"one")
    store.redis.delete(*store.redis.keys("fastar:*:*:*"))
    with pytest.raises(StoreError, match="noeviction"):
        store.get("token")


def test_a_full_redis(store):
    store.put("token", 1, b"one")
    store.redis.config_set("maxmemory", "1")
    try:
        for act in (lambda: store.put("token", 2, b"two"), lambda: store.claim("token", 1)):
            with pytest.raises(StoreError, match="cannot write .it is full.; allowed: "):
                act()
        assert store.get("token") == (1, b"one")
    finally:
        store.redis.config_set("maxmemory", "0")


def test_errors_say_what_and_no_secrets(server, monkeypatch):
    monkeypatch.setattr(redis_store, "ANSWER", 0.3)
    cases = {
        server.url.replace(PASSWORD, "wr0ng-secret"): "refuses our password",
        f"redis://:{PASSWORD}@{FREE_PORT}": "cannot be reached",
        f"redis://:{PASSWORD}@127.0.0.1:port": "cannot open the store",
        f"rediss://:{PASSWORD}@127.0.0.1:{server.port}": "no answer",  # TLS with one that has none
    }
    for url, reason in cases.items():
        began = time.monotonic()
        with pytest.raises(StoreError) as refused:
            open_store(url, 2, 100)
        assert time.monotonic() - began < 3
        assert reason in str(refused.value)
        assert "secret" not in str(refused.value)
        assert "s3cret" not in str(refused.value)
        assert refused.value.__cause__ is None


def test_a_redis_that_dies(tmp_path):
    with running_redis(tmp_path) as server:
        store = open_store(server.url, 2, 100)
        store.put("token", 1, b"one")
        server.stop()
        for act in (lambda: store.put("token", 2, b"two"), lambda: store.chunks("token")):
            with pytest.raises(StoreError, match="it cannot be reached"):
                act()
        store.redis.close()


def test_without_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "fastar_backend.service.redis_store")
    with pytest.raises(StoreError, match=r"fastar-serve\[redis\]"):
        open_store("redis://127.0.0.1", 2, 100)
