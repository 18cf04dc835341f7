"""Frames as packets, made next to the model: a raw stream of 64x96 pixels at 24 FPS is 3.5 Mbit/s, of 480x832 230."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
from PIL import Image

QUALITY = 90  # of a JPEG, 1..95
KEYFRAME_SECONDS = 2.0


class Encoder(Protocol):
    """Of one stream."""

    def encode(self, frames: np.ndarray) -> list[bytes]:
        """frames: uint8 [n, height, width, 3] -> n packets."""

    def close(self) -> None: ...


def make_encoder(encoding: str, fps: float, width: int, height: int) -> Encoder | None:
    """None for "raw". The first packet of an encoder can always be decoded without earlier ones."""
    if encoding == "jpeg":
        return Jpeg()
    return H264(fps, width, height) if encoding == "h264" else None


class Jpeg:
    def encode(self, frames: np.ndarray) -> list[bytes]:
        packets = []
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "JPEG", quality=QUALITY)
            packets.append(buffer.getvalue())
        return packets

    def close(self) -> None:
        pass


class H264:
    """Annex B, one access unit a frame, no frame waits for a later one. Parameter sets stand before each keyframe, so
    a viewer may begin at any of them. Odd sizes lose nothing: the last row and column are doubled, and the client cuts
    to the world's size."""

    def __init__(self, fps: float, width: int, height: int) -> None:
        self.odd = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        self.context = av.CodecContext.create("libx264", "w")
        self.context.width, self.context.height = width + width % 2, height + height % 2
        self.context.pix_fmt = "yuv420p"
        rate = max(1, round(fps))
        self.context.framerate, self.context.time_base = rate, Fraction(1, rate)
        self.context.gop_size = max(1, round(KEYFRAME_SECONDS * fps))
        self.context.max_b_frames = 0
        self.context.thread_count = 1  # the model needs the cores
        self.context.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
        self.next = 0

    def encode(self, frames: np.ndarray) -> list[bytes]:
        packets = []
        for frame in np.pad(frames, self.odd, "edge"):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, self.next = self.next, self.next + 1
            packets.append(b"".join(bytes(packet) for packet in self.context.encode(picture)))
        return packets

    def close(self) -> None:
        self.context = None
