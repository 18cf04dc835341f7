"""How a world that is loaded is run: by kernels, in 8 bits, compiled."""

from __future__ import annotations

import torch

from fastar_backend.config import ExecutionConfig
from fastar_backend.errors import InvalidInput
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.fp8 import quantise_blocks
from fastar_backend.model.taehv import TinyDecoder
from fastar_backend.model.world import World

FP8_CAPABILITY = (8, 9)  # the first one with fp8 units
FP8_MULTIPLE = 16  # of the sizes of a product on them


def tune(world: World, execution: ExecutionConfig) -> None:
    """In place. Raises InvalidInput where the device or the model cannot do what is asked."""
    dit = world.dit
    weight = dit.head.head.weight
    if execution.precision == "fp8":
        if weight.is_cuda:
            _check_fp8(dit, torch.cuda.get_device_capability(weight.device))
        quantise_blocks(dit)
    half = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
    fused = half and execution.precision != "fp8" and _fuse(dit)
    if half if execution.compile is None else execution.compile:
        if not fused:
            dit.compile_blocks()
        if isinstance(world.decoder, TinyDecoder):  # Wan's VAE would take three times the memory, compiled
            world.decoder.decode = torch.compile(world.decoder.decode, dynamic=False)


def _fuse(dit: CausalDiT) -> bool:
    from fastar_backend.model.fused import fuse_blocks  # Triton comes with PyTorch for CUDA only

    return fuse_blocks(dit)


def _check_fp8(dit: CausalDiT, capability: tuple[int, int]) -> None:
    if capability < FP8_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, FP8_CAPABILITY))
        raise InvalidInput("precision", f"fp8 on a GPU of compute capability {have}", f"auto, or {need} and newer")
    dtype = dit.head.head.weight.dtype
    if dtype != torch.bfloat16:
        raise InvalidInput("precision", f"fp8 in a world of {dtype}", "auto, or a world whose dtype is bfloat16")
    for name in ("dim", "ffn_dim"):
        if (size := getattr(dit.config, name)) % FP8_MULTIPLE:
            raise InvalidInput("precision", f"fp8 with model.{name} {size}", f"auto, or a multiple of {FP8_MULTIPLE}")
