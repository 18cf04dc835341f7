"""Filmstrips and a video: the same moments of one scene, policies side by side."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastar_backend.evaluation.scenes import load, scene_name
from fastar_backend.evaluation.store import Store
from fastar_backend.evaluation.suites import Settings

# Shown at most: those of these that there are, in this order; then others.
STRIP = ("dense", "tempcache-quant", "fastar-quant", "fastar default", "window", "flowcache", "radial", "svg1", "svg2",
         "teacache", "flowcache+radial", "paper-recipe")  # fmt: skip
MOMENTS = 8
ROWS, TILES = 12, 6
STRIP_WIDTH, TILE_WIDTH = 1180, 240  # pixels
LABEL, CAPTION, GAP = 130, 18, 2


def make(store: Store, settings: Settings, policies: list[str], folder: Path) -> list[tuple[str, str]]:
    """Writes filmstrip.jpg and side_by_side.mp4 of the first scene; returns names and captions."""
    videos: dict[str, np.ndarray] = {}
    for name in [*(n for n in STRIP if n in policies), *(n for n in policies if n not in STRIP)]:
        path = store.media(f"rollout-{name}")
        if path.exists():
            with np.load(path) as file:
                if "truth" in file.files:
                    videos.setdefault("the game", file["truth"])
                videos[name] = file["video"]
    if not [name for name in videos if name != "the game"]:
        return []
    scene = load(store.scenes, scene_name("walk", settings.scenarios[0], settings.seed))
    about = f"{scene.scenario or 'one scene'}, same prompt, actions and noise"
    strip(dict(list(videos.items())[:ROWS]), folder / "filmstrip.jpg")
    film(dict(list(videos.items())[:TILES]), folder / "side_by_side.mp4")
    return [("filmstrip.jpg", f"Filmstrips ({about}), frame numbers above."),
            ("side_by_side.mp4", f"Side by side, as a video ({about}).")]  # fmt: skip


def strip(videos: dict[str, np.ndarray], path: Path) -> None:
    """A row for each video, columns at equal times."""
    length = max(map(len, videos.values()))
    times = np.linspace(0, length - 1, min(MOMENTS, length)).round().astype(int)
    height, width = next(iter(videos.values())).shape[1:3]
    wide = (STRIP_WIDTH - LABEL) // len(times)
    tall = max(1, round(wide * height / width))
    sheet = Image.new("RGB", (LABEL + len(times) * (wide + GAP), CAPTION + len(videos) * (tall + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, time in enumerate(times):
        draw.text((LABEL + column * (wide + GAP) + 2, 2), str(time), fill="black", font=font)
    for row, (name, video) in enumerate(videos.items()):
        top = CAPTION + row * (tall + GAP)
        draw.text((4, top + tall // 2 - 7), name, fill="black", font=font)
        for column, time in enumerate(times):
            if time < len(video):
                picture = Image.fromarray(video[time]).resize((wide, tall), Image.Resampling.BILINEAR)
                sheet.paste(picture, (LABEL + column * (wide + GAP), top))
    sheet.save(path, quality=85, optimize=True)


def film(videos: dict[str, np.ndarray], path: Path, fps: int = 12) -> None:
    """All videos in a grid of three columns, with their names; H.264."""
    import av

    height, width = next(iter(videos.values())).shape[1:3]
    wide = TILE_WIDTH
    tall = round(wide * height / width)
    columns = min(3, len(videos))
    rows = -(-len(videos) // columns)
    across, down = columns * (wide + GAP) - GAP, rows * (tall + CAPTION)
    size = (across + across % 2, down + down % 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": "26", "preset": "slow"}
        for time in range(max(map(len, videos.values()))):
            sheet = Image.new("RGB", size, "white")
            draw = ImageDraw.Draw(sheet)
            for index, (name, video) in enumerate(videos.items()):
                left, top = index % columns * (wide + GAP), index // columns * (tall + CAPTION)
                draw.text((left + 4, top + 2), name, fill="black", font=ImageFont.load_default(12))
                picture = Image.fromarray(video[min(time, len(video) - 1)])
                sheet.paste(picture.resize((wide, tall), Image.Resampling.BILINEAR), (left, top + CAPTION))
            for packet in stream.encode(av.VideoFrame.from_image(sheet)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
