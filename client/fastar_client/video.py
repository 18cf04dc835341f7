"""What a stream leaves on disk: the video, a sheet of stills, and JSON. Failures to write raise OutputError."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastar_client.errors import OutputError, invalid


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system or FFmpeg says about writing `path` into OutputError."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"{path}: cannot be written ({reason}); free some space or choose another --out") from None


class Mp4Writer:
    """H.264 (MPEG-4 where FFmpeg lacks x264) in fragmented MP4: whatever has been written stays playable.

    The file is created at once; the first frames fix the size. Odd heights and widths grow by one repeated row or
    column, as yuv420p needs even ones. `fps` may be set until then. Raises OutputError.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 24.0) -> None:
        self.path = Path(path)
        self.fps = fps
        self.frames = 0
        self._container: Any = None
        self._stream: Any = None
        self._failed = False
        with output_errors(self.path):
            self.path.open("wb").close()

    def write(self, frames: np.ndarray) -> None:
        """frames: uint8 [n, height, width, 3], RGB."""
        if self._failed or not len(frames):
            return
        try:
            with output_errors(self.path):
                if self._container is None:
                    self._open(*frames.shape[1:3])
                for frame in frames:
                    odd = [(0, size % 2) for size in frame.shape[:2]] + [(0, 0)]
                    picture = av.VideoFrame.from_ndarray(np.pad(frame, odd, mode="edge"), format="rgb24")
                    self._container.mux(self._stream.encode(picture))
                    self.frames += 1
        except OutputError:
            self._failed = True
            raise

    def close(self) -> None:
        """Writes what the encoder still holds. May be called again."""
        container, self._container = self._container, None
        if container is None:
            return
        with output_errors(self.path):
            try:
                if not self._failed:
                    container.mux(self._stream.encode(None))
            finally:
                container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.close()
        except OutputError:
            if kind is None:  # else the first error tells enough
                raise

    def _open(self, height: int, width: int) -> None:
        if not 0 < self.fps <= 1000:
            raise invalid("fps", self.fps, "a number > 0 and <= 1000")
        rate = Fraction(self.fps).limit_denominator(1001)
        flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(self.path), "w", format="mp4", options=flags)
        if "libx264" in av.codecs_available:
            self._stream = self._container.add_stream("libx264", rate=rate)
            self._stream.options = {"preset": "veryfast", "crf": "18"}
        else:
            self._stream = self._container.add_stream("mpeg4", rate=rate)
            self._stream.bit_rate = 8_000_000
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.gop_size = max(1, round(rate))  # a key frame, hence a fragment, per second


class Sampler:
    """Keeps at most 2 * `count` frames, evenly spaced over a stream of unknown length."""

    def __init__(self, count: int = 12) -> None:
        self._count, self._stride = count, 1
        self._kept: dict[int, np.ndarray] = {}

    def add(self, first_frame: int, frames: np.ndarray) -> None:
        """frames: uint8 [n, height, width, 3], the stream's frames from `first_frame` on."""
        for number, frame in enumerate(frames, first_frame):
            if number % self._stride == 0:
                self._kept[number] = frame.copy()  # not the chunk that it is a view of
                if len(self._kept) > 2 * self._count:
                    self._stride *= 2
                    self._kept = {n: f for n, f in self._kept.items() if n % self._stride == 0}

    @property
    def frames(self) -> dict[int, np.ndarray]:
        return dict(self._kept)


def contact_sheet(frames: Mapping[int, np.ndarray], columns: int = 6, min_width: int = 192) -> bytes:
    """A PNG of `frames` (uint8 [height, width, 3], all of one size), each under its number.

    Small frames are enlarged by whole factors without smoothing, to show the pixels as they are.
    """
    if not frames:
        raise invalid("frames", {}, "at least one frame")
    height, width = next(iter(frames.values())).shape[:2]
    factor = max(1, -(-min_width // width))
    font = ImageFont.load_default(14)
    label, gap = 20, 4
    cell_height, cell_width = height * factor + label + gap, width * factor + gap
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (min(columns, len(frames)) * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (number, frame) in enumerate(sorted(frames.items())):
        top, left = i // columns * cell_height + gap, i % columns * cell_width + gap
        draw.text((left, top), str(number), fill="black", font=font)
        picture = Image.fromarray(np.ascontiguousarray(frame))
        sheet.paste(picture.resize((width * factor, height * factor), Image.Resampling.NEAREST), (left, top + label))
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """All of `content` or nothing: readers never see half a file. Raises OutputError."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with output_errors(target):
        try:
            part.write_bytes(content)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """As `write_bytes`. NaN and infinity, which JSON lacks, raise ValueError."""
    write_bytes(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
