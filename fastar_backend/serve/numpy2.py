"""Lets the wheel's Triton server, built for numpy 1, read BYTES inputs in an environment with numpy 2 (Python 3.13).

Its stub asks a numpy dtype for its item size at the place where numpy 1 kept it, finds 0 there, and makes every array
with strides of 0: all bytes of an input become the first one. The stub takes numpy's C functions from the table in
`numpy.core.multiarray._ARRAY_API`; `repair()` puts a copy there whose PyArray_NewFromDescr lets numpy choose such
strides. Arrays that a model returns would still arrive empty: ours hands over tensors by DLPack. The canary sees
whether all this works before a server is called ready.

`runtime.prepare` appends this file to the stub's own support module, so it may import nothing but numpy.
"""

import ctypes

import numpy

NEW_FROM_DESCR = 94  # its place in the table, fixed by numpy's ABI
ENTRIES = 300  # copied: the stub asks for none beyond 282, and numpy has more


def repair():
    """To be called once, before the first request; does nothing with numpy 1."""
    if numpy.__version__.startswith("1."):
        return
    import numpy.core.multiarray as multiarray  # the alias that numpy 2 keeps for modules built like this stub

    pointer, ssize = ctypes.c_void_p, ctypes.POINTER(ctypes.c_ssize_t)
    unpack, pack = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    unpack.restype, unpack.argtypes = pointer, [ctypes.py_object, ctypes.c_char_p]
    pack.restype, pack.argtypes = ctypes.py_object, [pointer, ctypes.c_char_p, pointer]

    table = (pointer * ENTRIES)(*(pointer * ENTRIES).from_address(unpack(multiarray._ARRAY_API, None)))
    # (type, dtype, dimensions, shape, strides, data, flags, object) -> array
    signature = ctypes.PYFUNCTYPE(pointer, pointer, pointer, ctypes.c_int, ssize, ssize, pointer, ctypes.c_int, pointer)
    original = signature(table[NEW_FROM_DESCR])

    def new_from_descr(kind, dtype, dimensions, shape, strides, *rest):
        if strides and not any(strides[:dimensions]):
            strides = None
        return original(kind, dtype, dimensions, shape, strides, *rest)

    replacement = signature(new_from_descr)
    table[NEW_FROM_DESCR] = ctypes.cast(replacement, pointer).value
    multiarray._ARRAY_API = pack(ctypes.addressof(table), None, None)
    repair.alive = (table, replacement, original)  # as long as the process: C code holds their addresses
