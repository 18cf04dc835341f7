"""The Dockerfiles' own steps on a plain Debian, and what they make as a pod runs it: not as root, on a read-only root.

What NVIDIA's image brings (Triton, CUDA, Python 3.12) is not in it: Triton is pytriton's, Python is Debian's.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_api import NAMESPACE, eventually, fleet
from fastar_client import connect
from running_envoy import free_ports

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "mmdebstrap", "unshare")
PACKAGES = ("ca-certificates", "libpython3.11", "python-is-python3", "python3-pip", "python3-venv")
LINKS = os.environ.get("PIP_FIND_LINKS", "")  # a folder of wheels, if any: PyTorch without CUDA saves gigabytes
OURS = ("/etc/ssl/certs", "/etc/pip.conf", LINKS)  # for what is downloaded here
# A pod's view: the image read-only, /tmp its own, nobody's rights. Then the command, without our environment.
POD = """
set -e
mount --bind "$1" "$1"
for bind in $2; do mount --rbind "${bind%%:*}" "$1${bind##*:}"; done
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -o remount,ro,bind "$1"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
image="$1"
shift 2
exec chroot --userspec=1000:1000 "$image" /usr/bin/env -i "$@"
"""

pytestmark = [
    pytest.mark.slow,  # six minutes, gigabytes
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
        reason=f"needs root and {', '.join(TOOLS)}: apt install buildah mmdebstrap",
    ),
]


class Builder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> str:
        command = ["buildah", "--root", self.folder / "store", "--runroot", self.folder / "run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def build(self, context: Path, *options: str) -> Path:
        """Root folder of the image."""
        ours = [text for path in filter(os.path.exists, OURS) for text in ("-v", f"{path}:{path}:ro")]
        ours += ["--env", f"PIP_FIND_LINKS={LINKS}"] if LINKS else []
        flags = ["--isolation", "chroot", "--pull-never", "--layers=false", "--format", "docker", *ours, *options]
        self("bud", *flags, "-t", "built", str(context))
        return Path(self("mount", self("from", "--pull-never", "localhost/built")))


def bases(dockerfile: Path) -> set[str]:
    """Images that it begins from."""
    text = dockerfile.read_text()
    values = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE))
    names = {name for name in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if name not in stages}
    return {re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], name) for name in names}


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Iterator[Builder]:
    builder = Builder(tmp_path_factory.mktemp("images"))
    tar = builder.folder / "debian.tar"
    subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", tar], check=True)
    container = builder("from", "scratch")
    try:
        builder("add", container, str(tar), "/")
        image = builder("commit", "-q", container, "localhost/debian")
        for name in bases(ROOT / "Dockerfile") | bases(ROOT / "k8s" / "controller" / "Dockerfile"):
            builder("tag", image, name if "/" in name else f"localhost/{name}")
        yield builder
    finally:
        builder("umount", "--all")
        builder("rm", "--all")
        builder("rmi", "--all", "--force")


@contextlib.contextmanager
def pod(image: Path, *command: str, binds: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
    """binds: ours:theirs."""
    process = subprocess.Popen(["unshare", "-m", "bash", "-c", POD, "pod", image, " ".join(binds), *command])
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(60) == 0


def answers(url: str) -> str:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
        return reply.read().decode()
    return ""


def test_the_controllers_image(builder):
    image = builder.build(ROOT / "k8s" / "controller")
    (port,) = free_ports(1)
    command = ["PATH=/opt/controller/bin:/usr/bin", "fastar-controller", "--namespace", NAMESPACE, "--interval", "0.2"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with fleet((1, 2), (2, 2)) as (api, _), pod(image, *command, "--api", api.url):
        eventually(lambda: api.costs() == {"triton-0": "100", "triton-1": "200"}, 20)
        eventually(lambda: api.opened() == {"triton-0"})
        assert answers(f"http://127.0.0.1:{port}/healthz") == "ok\n"


def test_the_servers_image(builder):
    """Up to its stage `serve`; with a stream of the embedded world."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("pytriton's Triton has the stubs of one Python, which must be bookworm's, 3.11")
    image = builder.build(ROOT, "--target", "serve")
    packages = Path(importlib.util.find_spec("pytriton").origin).parents[1]
    binds = []
    for name in ("pytriton", "nvidia_pytriton.libs"):
        image.joinpath("opt/wheel", name).mkdir(parents=True)
        binds.append(f"{packages / name}:/opt/wheel/{name}")
    image.joinpath("opt/tritonserver").symlink_to("/opt/wheel/pytriton/tritonserver")
    http, grpc, metrics, admin = map(str, free_ports(4))
    command = ["PATH=/opt/fastar/venv/bin:/opt/tritonserver/bin:/usr/bin", "HOME=/tmp"]
    command += ["FASTAR_MODEL_REPOSITORY=/opt/fastar/model_repository", "fastar", "serve", "--host", "127.0.0.1"]
    command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--admin-port", admin]
    command += ["--device", "cpu", "--threads", "1"]

    async def watch() -> None:
        async with connect(f"127.0.0.1:{grpc}") as c, c.stream("a maze", actions="forward") as stream:
            for _ in range(3):
                assert (await anext(stream)).frames.std() > 1

    with pod(image, *command, binds=tuple(binds)):
        eventually(lambda: answers(f"http://127.0.0.1:{admin}/placement") == "open\n", 90)
        asyncio.run(asyncio.wait_for(watch(), 60))
    flags = [*command, "--snapshots", "redis://127.0.0.1:1"]
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", POD, "pod", image, " ".join(binds), *flags], capture_output=True, text=True
    )
    assert "allowed: redis://[user:password@]host:port[/db] of a Redis that answers" in done.stderr, "it has the client"
