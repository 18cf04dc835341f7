"""What is looked at when an engine is loaded, so that it fails then, in one line, and not at a stream's first chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable

import psutil
import torch

from fastar_backend.config import AttentionConfig
from fastar_backend.errors import InvalidInput

log = logging.getLogger(__name__)


def check_device(device: torch.device | str) -> None:
    """Raises InvalidInput."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device", f"got {device}, and PyTorch sees no GPU", "cpu, or auto: a GPU where there is one")


def check_attention(attention: AttentionConfig, chunk_frames: int, field: str) -> None:
    """chunk_frames: latent frames of a chunk. Raises InvalidInput."""
    if attention.bounded and attention.budget_frames < chunk_frames:
        least = f"at least {chunk_frames}, a chunk's latent frames"
        raise InvalidInput(f"{field}.budget_frames", f"got {attention.budget_frames}", least)


def check_memory(
    device: torch.device, attention: AttentionConfig, bytes_of: Callable[[AttentionConfig], int], max_streams: int
) -> None:
    """bytes_of: what a stream with that attention holds. Logs how many streams fit into what is free now, if not all
    do. Raises InvalidInput if none does."""
    needed, free = bytes_of(attention), free_bytes(device)
    if free < needed:
        what = f"{attention.budget_frames} take {needed} bytes a stream, and {free} are free on {device}"
        most = _largest_budget(attention, bytes_of, free)
        raise InvalidInput("attention.budget_frames", what, f"at most {most}" if most else "more free memory")
    if free < needed * max_streams:
        log.warning(
            "streams: %d of %d fit: each takes %d bytes, and %d are free on %s",
            free // needed, max_streams, needed, free, device,
        )  # fmt: skip


def free_bytes(device: torch.device) -> int:
    """Of the device's memory, or of the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _largest_budget(attention: AttentionConfig, bytes_of: Callable[[AttentionConfig], int], free: int) -> int:
    """The largest budget_frames of a stream that fits; 0 if none does."""
    if not attention.bounded:  # it has none
        return 0
    least = attention.sink_frames + (attention.recent_frames if attention.kind == "fastar" else 1)
    budgets = range(attention.budget_frames - 1, least - 1, -1)
    return next((b for b in budgets if bytes_of(attention.model_copy(update={"budget_frames": b})) <= free), 0)
