"""What is written: video, contact sheet, JSON; and the figures in it."""

from __future__ import annotations

import io
import json
import os

import av
import numpy as np
import pytest
from fastar_client.actions import Script, parse_script
from fastar_client.errors import InvalidArgument, OutputError
from fastar_client.protocol import Chunk, parse_stats
from fastar_client.timing import ArrivalLog, cache_full_from
from fastar_client.video import Mp4Writer, Sampler, contact_sheet, write_bytes, write_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scripted import ScriptedServer


def ramp(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames whose brightness rises with their number."""
    values = np.linspace(10, 240, frames).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (frames, height, width, 3)).copy()


def decode(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(container.streams.video[0].average_rate)


def test_video_plays_and_shows_the_frames(tmp_path):
    frames = ramp(50)
    with Mp4Writer(tmp_path / "video.mp4", 25) as video:
        for i in range(0, 50, 7):
            video.write(frames[i : i + 7])
    seen, rate = decode(tmp_path / "video.mp4")
    assert seen.shape == frames.shape
    assert rate == 25
    assert abs(seen.astype(int) - frames).max() < 12  # yuv420p and compression
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_video_without_x264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", set())
    with Mp4Writer(tmp_path / "video.mp4", 25) as video:
        video.write(ramp(10))
    assert decode(tmp_path / "video.mp4")[0].shape == (10, 32, 48, 3)


def test_video_of_odd_size_and_rate(tmp_path):
    with Mp4Writer(tmp_path / "video.mp4", 8.75) as video:
        video.write(ramp(5, 33, 47))
    seen, rate = decode(tmp_path / "video.mp4")
    assert seen.shape == (5, 34, 48, 3)
    assert rate == 8.75


def test_what_is_written_is_playable_before_the_end(tmp_path):
    video = Mp4Writer(tmp_path / "video.mp4", 10)
    for _ in range(10):
        video.write(np.random.default_rng(0).integers(0, 256, (10, 32, 48, 3), np.uint8))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "video.mp4").read_bytes())  # as after a power cut
    video.close()
    assert 20 <= len(decode(tmp_path / "cut.mp4")[0]) < 100
    assert len(decode(tmp_path / "video.mp4")[0]) == 100


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
def test_a_full_disk(tmp_path):
    path = tmp_path / "video.mp4"
    path.symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), np.uint8)

    def write_a_lot():
        with Mp4Writer(path, 10) as video:
            for _ in range(10):
                video.write(noise)

    with pytest.raises(OutputError, match=f"^{path}: cannot be written .No space left on device"):
        write_a_lot()

    def write_little():
        with Mp4Writer(path, 10) as video:
            video.write(noise[:2])  # reaches the disk on closing

    with pytest.raises(OutputError, match="No space left"):
        write_little()


def test_unwritable(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        Mp4Writer(tmp_path / "nowhere" / "video.mp4", 10)
    with pytest.raises(OutputError, match="No such file"):
        write_json(tmp_path / "nowhere" / "timings.json", {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "timings.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet():
    frames = dict(zip((0, 24, 480), ramp(3, 8, 12), strict=True))
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(frames, columns=2, min_width=100))))
    factor = 9  # the smallest whole one that gives 100 pixels
    assert sheet.shape == (2 * (8 * factor + 24) + 4, 2 * (12 * factor + 4) + 4, 3)
    for i, frame in enumerate(frames.values()):
        top, left = i // 2 * (8 * factor + 24) + 4 + 20, i % 2 * (12 * factor + 4) + 4
        assert (sheet[top : top + 8 * factor, left : left + 12 * factor] == frame[0, 0, 0]).all()
        assert (sheet[top - 20 : top, left : left + 40] < 128).any()  # its number
    with pytest.raises(InvalidArgument):
        contact_sheet({})


@given(st.lists(st.integers(0, 30), max_size=60))
def test_sampler_keeps_evenly_spaced_frames(sizes):
    sampler, first = Sampler(4), 0
    for size in sizes:
        sampler.add(first, np.arange(first, first + size)[:, None, None, None] + np.zeros((1, 1, 1, 3), int))
        first += size
    kept = sampler.frames
    assert len(kept) <= 8
    assert len(kept) >= min(first, 4)
    assert all(frame[0, 0, 0] == number for number, frame in kept.items())
    assert len(set(np.diff(list(kept)))) <= 1
    assert not first or min(kept) == 0


def log_of(received: list[float], frames: int = 4, tokens: list[float] | None = None, fps: float | None = None):
    server, log = ScriptedServer(), ArrivalLog(100.0, fps)
    for i, t in enumerate(received):
        reply = server.reply(i, frames, world=i == 0, **({"cache_tokens": tokens[i]} if tokens else {}))
        stats = parse_stats(reply.stats.tobytes())
        log.add(Chunk(reply.frames[0], stats, ("",), 100 + t - 0.1, 100 + t))
    json.dumps(log.as_json(), allow_nan=False)
    return log


def test_metrics_of_a_steady_stream():
    # One slow first chunk; the cache (100, 200, 300, 400, 400, ... tokens) is full from chunk 3 on, within one chunk.
    received = [2.0, 2.5, 3.0, 3.5] + [3.5 + 0.2 * i for i in range(1, 41)]
    metrics = log_of(received).metrics()
    assert metrics["time_to_first_frame_seconds"] == pytest.approx(2.0)
    assert metrics["frames"] == 4 * 44
    assert metrics["cache_full_from_chunk"] == 3
    assert metrics["steady_fps"] == pytest.approx(20)
    assert metrics["chunk_interval_seconds"]["p95"] == pytest.approx(0.2)
    assert metrics["jitter_seconds"]["max"] == pytest.approx(0, abs=1e-9)
    assert metrics["request_seconds"]["p50"] == pytest.approx(0.1)
    assert metrics["last_over_first_decile"] == pytest.approx(1)
    assert metrics["chunk_seconds_slope_per_minute"] == pytest.approx(0, abs=1e-9)
    assert metrics["paced"] is None


def test_metrics_of_a_stream_that_slows_down():
    intervals = 0.1 + 0.001 * np.arange(100)
    metrics = log_of(list(np.cumsum(intervals)), tokens=[100.0 * (i + 1) for i in range(100)]).metrics()
    assert metrics["cache_full_from_chunk"] is None  # it grows without end
    assert metrics["last_over_first_decile"] == pytest.approx(intervals[91:].mean() / intervals[1:10].mean())
    assert metrics["chunk_seconds_slope_per_minute"] > 0.3


def test_metrics_of_a_paced_stream_with_one_stall():
    # 4 frames at 8 FPS: a chunk every 0.5 s; chunk 2 comes 0.7 s late, later ones in time for the viewer who waited.
    metrics = log_of([1.0, 1.4, 2.7, 2.8, 3.3, 3.8], fps=8).metrics()["paced"]
    assert metrics["stalls"] == 1
    assert metrics["rebuffer_ratio"] == pytest.approx(0.7 / 3.7)
    assert metrics["continuous_play_ratio"] == pytest.approx(2 / 6)  # deadlines 1, 1.5, 2, 2.5, 3, 3.5
    assert metrics["realtime_factor_p95"] == pytest.approx(
        np.percentile(np.diff([1.0, 1.4, 2.7, 2.8, 3.3, 3.8]) * 2, 95)
    )


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_metrics_of_very_short_streams(chunks):
    metrics = log_of([1.0, 1.5][:chunks], fps=8).metrics()
    assert metrics["frames"] == 4 * chunks
    assert metrics["steady_fps"] == (pytest.approx(8) if chunks == 2 else None)
    assert metrics["time_to_first_frame_seconds"] == (1.0 if chunks else None)


def test_recent_fps():
    assert log_of([1.0]).recent_fps() is None
    assert log_of([1.0, 5.0, 5.5, 6.0]).recent_fps(2) == pytest.approx(8)


def test_cache_full_from():
    assert cache_full_from([]) is None
    assert cache_full_from([10, 20, 30, 30, 30, 30]) == 2
    assert cache_full_from([10, 20, 30, 40, 50, 60]) is None


def played(script: str, count: int, loop: bool = True) -> list[str]:
    source = parse_script(script, loop)
    if isinstance(source, str):
        return [source] * count
    return [action for action, _ in zip(source, range(count), strict=False)]


def test_action_scripts(tmp_path):
    assert played("forward*3, turn_left ,", 7) == ["forward"] * 3 + ["turn_left", ""] + ["forward"] * 2
    assert played("a*2,b", 9, loop=False) == ["a", "a", "b"]
    assert parse_script("forward+attack*8", loop=True) == "forward+attack"  # held: nothing to play
    assert played("*2,a", 4) == ["", "", "a", ""]
    file = tmp_path / "script.txt"
    file.write_text("forward*2\nturn_left\n")
    assert played(f"@{file}", 4) == ["forward", "forward", "turn_left", "forward"]


@pytest.mark.parametrize(
    "script", ["a*0", "a*-1", "a*x", "a*", "a*1.5", "a*99999999", "a*²", "x" * 257, "@/no/such/file"]
)
def test_bad_action_scripts(script):
    with pytest.raises(InvalidArgument, match="^actions: got"):
        parse_script(script, loop=True)


@given(st.lists(st.sampled_from("ab"), max_size=12), st.lists(st.integers(1, 4), max_size=8))
def test_scripts_are_taken_in_order_and_their_last_action_is_held(actions, sizes):
    script, left = Script(iter(actions)), list(actions)
    for size in sizes:
        taken = script.take(size)
        with pytest.raises(StopIteration) as done:  # nothing to wait for
            taken.send(None)
        want, left = left[:size], left[size:]
        held = [actions[-1] if actions else ""]
        assert list(done.value.value) == (want + held * (size - len(want)) if want else held)
