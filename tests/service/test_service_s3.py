"""Snapshots in an S3-compatible store: as in a folder, and epochs that only one gets.

Needs s3fs and moto in a virtual environment of their own: they want another python-dateutil than the Kubernetes client.
"""

from __future__ import annotations

import concurrent.futures
import time

import pytest
from store_histories import looks_as_in_a_folder, said

from fastar_backend.errors import UnknownStream
from fastar_backend.service.store import open_store

WHY = "s3fs and moto do not go with the Kubernetes client: a venv of their own"
pytest.importorskip("s3fs", reason=WHY)
moto = pytest.importorskip("moto.server", reason=WHY)


@pytest.fixture(scope="module")
def bucket():
    """Its URL, empty; the store's address and keys are in the environment, as a pod has them."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (values | {"DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(f"AWS_{name}", value)
        yield "s3://snapshots"
    server.stop()


@pytest.mark.parametrize("seed", range(3))
def test_any_history_looks_as_in_a_folder(bucket, tmp_path, seed):
    looks_as_in_a_folder(open_store(f"{bucket}/{seed}", keep=2, ttl=3600), tmp_path, seed, steps=100)


def test_eight_at_once_get_eight_epochs(bucket):
    stores = [open_store(f"{bucket}/race", keep=2, ttl=3600) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for turn in range(4):
            claims = [pool.submit(one.claim, "token", 3) for one in stores]
            assert sorted(claim.result() for claim in claims) == list(range(2 + 8 * turn, 10 + 8 * turn))


def test_large_ones_come_back_and_old_ones_are_swept(bucket):
    store, data = open_store(f"{bucket}/large", keep=2, ttl=1.0), bytes(range(256)) * (64 << 12)  # several parts
    store.put("token", 1, data)
    assert store.get("token") == (1, data)
    time.sleep(2.1)
    store.sweep()
    assert said(store.get, "token")[0] is UnknownStream
