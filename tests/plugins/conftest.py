"""The C++ library of plugins, built once, in pytest's cache: head dimension 64, float16, bfloat16, Hopper."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugins_sizes import LIBRARY


@pytest.fixture(scope="session")
def plugin_library(request) -> Path:
    """libfastar_plugins.so; its kernels are in ../kernels."""
    pytest.importorskip("kernel_lens", reason="has the headers of TensorRT: extra trt-test")
    from plugins.build import library

    return library(Path(request.config.cache.mkdir("plugins")), **LIBRARY)
