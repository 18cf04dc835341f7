"""A thin host of the C++ plugins: what TensorRT does with them, without TensorRT (csrc/host.cpp, by ctypes).

`Host(library)` opens libfastar_plugins.so and creates plugins; shapes, types and fields need no GPU, `run` does. Every
refusal of a plugin is a `PluginError` with the plugin's own message.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from fastar_backend.errors import FastarError, InvalidInput

TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "bfloat16": 7, "int64": 8}  # TensorRT's numbers
NAMES = {number: name for name, number in TYPES.items()}
MOST_DIMS = 8
FIELDS = {1: c_float, 2: c_double, 5: c_int32, 10: c_int64}  # TensorRT's PluginFieldType


class PluginError(FastarError):
    """A plugin, or its creator, refuses."""

    code = "INVALID_ARGUMENT"


class _Field(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32)]

    def value(self) -> int | float:
        return ctypes.cast(self.data, POINTER(FIELDS[self.type]))[0]


def _ints(values: Sequence[int], kind: Any = c_int32) -> Any:
    return (kind * max(len(values), 1))(*values)


class Host:
    """A plugin library and its creators. names: of the operators; fields: their attributes' default values."""

    def __init__(self, library: Path, host: Path | None = None, registered: bool = False) -> None:
        """host: by default the one beside the library. registered: the library is one that registers itself. Raises
        PluginError where the library cannot be opened."""
        host = host or library.with_name("libfastar_plugins_host.so")
        for path in (library, host):
            if not path.exists():
                raise InvalidInput("library", f"{path} does not exist", "what plugins.build.library makes")
        self.c = ctypes.CDLL(str(host), mode=ctypes.RTLD_GLOBAL if registered else ctypes.RTLD_LOCAL)
        for name in ("host_open", "host_registered", "host_create", "host_clone"):
            getattr(self.c, name).restype = c_void_p
        self.c.host_message.restype = c_char_p
        count = c_int32()
        if registered:
            ctypes.CDLL(str(library))
            self.creators = c_void_p(self.c.host_registered(byref(count)))
        else:
            self.creators = c_void_p(self.c.host_open(str(library).encode(), byref(count)))
        if not self.creators:
            raise PluginError(self.message())
        self.names: list[str] = []
        self.namespaces: set[tuple[str, str]] = set()
        self.fields: dict[str, dict[str, int | float]] = {}
        for at in range(count.value):
            name, version, space, fields, length = c_char_p(), c_char_p(), c_char_p(), POINTER(_Field)(), c_int32()
            self.c.host_creator(
                self.creators, at, byref(name), byref(version), byref(space), byref(fields), byref(length)
            )
            self.names.append(name.value.decode())
            self.namespaces.add((space.value.decode(), version.value.decode()))
            self.fields[self.names[-1]] = _read(fields, length.value)

    def message(self) -> str:
        """Of the last refusal."""
        return self.c.host_message().decode()

    def create(self, name: str, fields: Mapping[str, int | float] | None = None, runtime: bool = False) -> Plugin:
        """fields: attributes; a float is passed as float32, the others as int32. runtime: as when an engine is read."""
        if name not in self.names:
            raise InvalidInput("name", repr(name), ", ".join(self.names))
        kept, given = [], []
        for key, value in (fields or {}).items():
            kept.append((c_float if isinstance(value, float) else c_int32)(value))
            kind = 1 if isinstance(value, float) else 5
            given.append(_Field(key.encode(), ctypes.cast(byref(kept[-1]), c_void_p), kind, 1))
        array = (_Field * max(len(given), 1))(*given)
        made = self.c.host_create(self.creators, self.names.index(name), array, len(given), int(runtime))
        if not made:
            raise PluginError(self.message())
        return Plugin(self, name, made)


def _read(fields: Any, length: int) -> dict[str, int | float]:
    return {fields[at].name.decode(): fields[at].value() for at in range(length)}


class Plugin:
    """One IPluginV3. Tensors are described by type names of PyTorch ("float16") and shapes; -1: not known yet."""

    def __init__(self, host: Host, name: str, handle: int) -> None:
        self.host, self.name, self.handle = host, name, c_void_p(handle)
        self.outputs = host.c.host_outputs(self.handle)

    def __del__(self) -> None:
        self.host.c.host_destroy(self.handle)

    def clone(self) -> Plugin:
        return Plugin(self.host, self.name, self.host.c.host_clone(self.handle))

    def fields(self) -> dict[str, int | float]:
        """What an engine keeps of it."""
        fields = POINTER(_Field)()
        return _read(fields, self.host.c.host_fields(self.handle, byref(fields)))

    def alias(self, output: int) -> int | None:
        """The input that the output is."""
        found = self.host.c.host_alias(self.handle, output)
        return None if found < 0 else found

    def types(self, inputs: Sequence[str]) -> list[str]:
        out = _ints([0] * self.outputs)
        numbers = _ints([TYPES[name] for name in inputs])
        self._check(self.host.c.host_types(self.handle, numbers, len(inputs), out, self.outputs))
        return [NAMES[number] for number in out[: self.outputs]]

    def shapes(self, inputs: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Of the outputs; needs `types` before it, where block sizes follow from the type."""
        ranks, dims = _ints([0] * self.outputs), _ints([0] * MOST_DIMS * self.outputs, c_int64)
        flat = [size for shape in inputs for size in shape]
        self._check(self.host.c.host_shapes(self.handle, _ints([len(shape) for shape in inputs]), _ints(flat, c_int64),
                                            len(inputs), ranks, dims, self.outputs))  # fmt: skip
        return [tuple(dims[at * MOST_DIMS : at * MOST_DIMS + ranks[at]]) for at in range(self.outputs)]

    def supports(self, at: int, types: Sequence[str], linear: Sequence[bool] | None = None) -> bool:
        """Whether tensor `at` of inputs and outputs may be as described, given those before it."""
        formats = _ints([0 if each else 1 for each in linear or [True] * len(types)])
        numbers, inputs = _ints([TYPES[name] for name in types]), len(types) - self.outputs
        return bool(self.host.c.host_supports(self.handle, at, numbers, formats, inputs, self.outputs))

    def configure(self, types: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Of inputs and outputs."""
        self._check(self.host.c.host_configure(*self._described(types, shapes)))

    def prepare(self, types: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """onShapeChange: checks, and loads the kernel where a GPU is."""
        self._check(self.host.c.host_run(*self._described(types, shapes), None, None))

    def run(
        self, types: Sequence[str], shapes: Sequence[Sequence[int]], addresses: Sequence[int], stream: int = 0
    ) -> None:
        """Enqueues the kernel. addresses: of inputs and outputs, on the GPU, which they outlive; stream: its handle."""
        pointers = (c_void_p * len(addresses))(*addresses)
        self._check(self.host.c.host_run(*self._described(types, shapes), pointers, c_void_p(stream)))

    def _described(self, types: Sequence[str], shapes: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        if len(types) != len(shapes):
            raise InvalidInput("shapes", f"{len(shapes)} beside {len(types)} types", "as many of both")
        flat = [size for shape in shapes for size in shape]
        return (self.handle, _ints([TYPES[name] for name in types]), _ints([len(shape) for shape in shapes]),
                _ints(flat, c_int64), len(types) - self.outputs, self.outputs)  # fmt: skip

    def _check(self, result: int) -> None:
        if result:
            raise PluginError(self.host.message())
