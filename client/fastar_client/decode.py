"""From what a reply brought (raw frames, JPEG or H.264 packets) to frames."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from PIL import Image

from fastar_client.errors import ServerError
from fastar_client.protocol import FRAMES, VIDEO, ChunkStats, Reply, World

SMALL = 100_000  # bytes of decoded frames up to which decoding on the event loop delays it by about a millisecond
SPS = 7  # the H.264 unit that begins a stream of packets


class Decoder:
    """Of one stream: H.264 packets refer to the ones before them, until a stream of packets begins anew."""

    def __init__(self) -> None:
        self._h264: Any = None

    def decode(self, reply: Reply, stats: ChunkStats, world: World) -> tuple[np.ndarray, tuple[bytes, ...] | None]:
        """Frames (uint8 [frames, height, width, 3], RGB, read-only) and packets (None for raw) of a chunk's reply.

        Raises ServerError where frames or packets are not what the stats say, or cannot be decoded.
        """
        if stats.encoding == "raw":
            frames, packets = reply.frames, None
            if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[-1] != 3:
                got = f"{frames.dtype} {list(frames.shape)}"
                raise ServerError(f"{FRAMES}: got {got}; expected uint8 [1, frames, height, width, 3]")
            frames = frames[0]
        else:
            packets = split(reply.video.tobytes(), stats.packets)
            try:
                pictures = [picture for packet in packets for picture in self._pictures(stats.encoding, packet)]
            except (av.FFmpegError, OSError, ValueError) as error:
                raise ServerError(f"{VIDEO}: {stats.encoding} packets cannot be decoded ({error})") from None
            if any(p.shape[0] < world.height or p.shape[1] < world.width for p in pictures):
                raise ServerError(f"{VIDEO}: frames smaller than the world's {world.height} x {world.width}")
            # H.264 of 4:2:0 has even sizes; what was added for that is cut away.
            pictures = [picture[: world.height, : world.width] for picture in pictures]
            frames = np.stack(pictures) if pictures else np.zeros((0, world.height, world.width, 3), np.uint8)
        if len(frames) != stats.frames:
            raise ServerError(f"{FRAMES}: {len(frames)} frames arrived; the stats of the chunk say {stats.frames}")
        frames.flags.writeable = False
        return frames, packets

    def _pictures(self, encoding: str, packet: bytes) -> list[np.ndarray]:
        if encoding == "jpeg":
            with Image.open(io.BytesIO(packet), formats=["JPEG"]) as image:
                return [np.asarray(image.convert("RGB"))]
        if encoding != "h264":
            raise ValueError(f"unknown encoding {encoding!r:.40}")
        if self._h264 is None or begins_anew(packet):
            self._h264 = av.CodecContext.create("h264", "r")
            self._h264.thread_type = "SLICE"  # threads per frame would hold frames back
            self._h264.flags |= av.codec.context.Flags.low_delay
        return [frame.to_ndarray(format="rgb24") for frame in self._h264.decode(av.Packet(packet))]


def is_small(world: World, stats: ChunkStats) -> bool:
    """Whether decoding is too quick to be worth a thread."""
    return stats.encoding == "raw" or world.height * world.width * 3 * stats.frames <= SMALL


def split(video: bytes, sizes: tuple[int, ...]) -> tuple[bytes, ...]:
    """The packets in VIDEO. Raises ServerError where their sizes do not add up."""
    if any(not isinstance(size, int) or size < 0 for size in sizes) or sum(sizes) != len(video):
        raise ServerError(f"{VIDEO}: {len(video)} bytes arrived; the stats of the chunk say {list(sizes)!s:.60}")
    ends = np.cumsum((0, *sizes)).tolist()
    return tuple(video[begin:end] for begin, end in zip(ends, ends[1:], strict=False))


def begins_anew(packet: bytes) -> bool:
    """Whether an Annex-B access unit carries an SPS (among the few small units that stand before the picture)."""
    at = packet.find(b"\x00\x00\x01", 0, 512)
    while 0 <= at < len(packet) - 3:
        if packet[at + 3] & 31 == SPS:
            return True
        at = packet.find(b"\x00\x00\x01", at + 3, 512)
    return False
