"""The contract of docs/structure.md, over a real tritonserver and the real engine."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.grpc as triton
from serve_raw import Refused, Stream, metric, solo, tensor, until

from fastar_backend.engine.stream import ChunkStats

pytestmark = pytest.mark.server

PROMPT = "walking through a maze of corridors"
SERVICE = {"process_bytes", "control", "received", "applied", "actions", "encoding", "packets", "queue_seconds"}
SERVICE |= {"encode_seconds", "late", "snapshot_chunk"}


@pytest.fixture(scope="module")
def world(server):
    """What chunk 0 says of the world; the health check's request says it without a stream."""
    with Stream(server.grpc_url) as stream:
        frames, stats = stream.chunk(["end"], start=True, end=True)
    assert len(frames) == 0
    return stats["world"]


@pytest.fixture(scope="module")
def expected(server):
    """The solo run that the other tests' streams are compared with."""
    return solo(server.grpc_url, 3, PROMPT, seed=7, actions=["forward"])


def test_a_stream_from_start_to_end(server, world):
    with Stream(server.grpc_url) as stream:
        replies = [stream.chunk(["forward"], PROMPT, {"seed": 7}, start=True)]
        replies.append(stream.chunk([""] * world["latent_frames_per_chunk"]))
        replies.append(stream.chunk(["forward+turn_left"], prompt="a dark red corridor"))
        replies.append(stream.chunk([""], end=True))
    first = 0
    for index, (frames, stats) in enumerate(replies):
        assert frames.dtype == np.uint8
        assert frames.shape[1:] == (world["height"], world["width"], 3)
        assert frames.std() > 1, "a blank picture"
        assert set(stats) == {*ChunkStats.__dataclass_fields__, *SERVICE, *(["world", "token"] if index == 0 else [])}
        assert (stats["chunk"], stats["first_frame"], stats["frames"]) == (index, first, len(frames))
        assert stats["process_bytes"] > 1e8
        assert 0 <= stats["density"] <= 1
        first += len(frames)
    assert all(len(frames) == world["chunk_frames"] for frames, _ in replies[1:])
    assert [stats["prompt_applied"] for _, stats in replies[1:]] == [False, True, False]
    assert replies[0][1]["world"] == world
    assert {"name", "height", "width", "buttons", "starts", "scenarios", "native_fps"} <= set(world)


def test_the_last_request_may_generate_nothing(server, expected):
    with Stream(server.grpc_url) as stream:
        frames, _ = stream.chunk(["forward"], PROMPT, {"seed": 7}, start=True)
        nothing, stats = stream.chunk(["end"], end=True)
    assert np.array_equal(frames, expected[0])
    assert nothing.shape == (0, *frames.shape[1:])
    assert stats["frames"] == 0
    assert metric(server, "fastar_streams_active") == 0


def test_same_seed_same_frames(server, expected):
    again = solo(server.grpc_url, 3, PROMPT, seed=7, actions=["forward"])
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))
    other = solo(server.grpc_url, 1, PROMPT, seed=8, actions=["forward"])
    assert not np.array_equal(expected[0], other[0])


def test_interleaved_streams_equal_their_solo_runs(server, expected):
    other = solo(server.grpc_url, 3, "defend the center", seed=3, actions=["turn_left"])
    with Stream(server.grpc_url) as a, Stream(server.grpc_url) as b:
        for index in range(3):  # both are under way at once, so Triton may batch them
            flags = {"start": index == 0, "end": index == 2}
            a.send(["forward"], PROMPT if index == 0 else "", {"seed": 7}, **flags)
            b.send(["turn_left"], "defend the center" if index == 0 else "", {"seed": 3}, **flags)
        for index in range(3):
            # In a batch the sums may be taken in another order: the last bit of a colour may differ.
            for stream, alone in ((a, expected), (b, other)):
                frames, _ = stream.reply()
                difference = np.abs(frames.astype(int) - alone[index])
                assert difference.max() <= 3
                assert difference.mean() < 0.1


BAD = {
    "empty prompt": ({"prompt": ""}, "PROMPT"),
    "huge prompt": ({"prompt": "x" * 4097}, "PROMPT"),
    "prompt not UTF-8": ({"prompt": b"\xff\xfe"}, "PROMPT"),
    "unknown button": ({"actions": ["forward+fly"]}, "ACTIONS[0]"),
    "huge action": ({"actions": ["f" * 257]}, "ACTIONS"),
    "wrong number of actions": ({"actions": [""] * 60}, "ACTIONS"),
    "too many actions": ({"actions": [""] * 65}, "ACTIONS"),
    "options not JSON": ({"options": "{nope"}, "OPTIONS"),
    "options deeply nested": ({"options": "[" * 4000}, "OPTIONS"),
    "options a list": ({"options": "[1]"}, "OPTIONS"),
    "huge options": ({"options": {"x": "y" * 8192}}, "OPTIONS"),
    "unknown option": ({"options": {"sed": 1}}, "OPTIONS.sed"),
    "negative seed": ({"options": {"seed": -1}}, "OPTIONS.seed"),
    "seed too large": ({"options": {"seed": 2**63}}, "OPTIONS.seed"),
    "unknown start": ({"options": {"start": "moon"}}, "OPTIONS.start"),
    "unknown attention": ({"options": {"attention": {"kind": "magic"}}}, "OPTIONS.attention.kind"),
    "huge budget": ({"options": {"attention": {"budget_frames": 10**9}}}, "OPTIONS.attention.budget_frames"),
}


def test_a_bad_request_fails_alone_and_says_why(server, expected):
    with Stream(server.grpc_url) as live:
        frames = [live.chunk(["forward"], PROMPT, {"seed": 7}, start=True)[0]]
        for name, (bad, field) in BAD.items():
            with Stream(server.grpc_url) as stream:
                stream.send(**({"prompt": PROMPT} | bad), start=True)
                with pytest.raises(Refused) as refused:
                    stream.reply()
                message = str(refused.value)
                assert refused.value.code == "INVALID_ARGUMENT", f"{name}: {message}"
                assert f"INVALID_ARGUMENT: {field}: " in message, name
                assert "; allowed: " in message, name
                assert "\n" not in message, name
                assert len(message) < 600, name
                # Its stream never came to be, whatever Triton thinks of the sequence.
                stream.send(end=True)
                with pytest.raises(Refused) as refused:
                    stream.reply()
                assert refused.value.code == "NOT_FOUND", name
        frames += [live.chunk(["forward"])[0], live.chunk(["forward"], end=True)[0]]
    assert all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True))
    assert metric(server, "fastar_streams_active") == 0


def test_a_bad_request_in_mid_stream_ends_that_stream(server):
    with Stream(server.grpc_url) as stream:
        stream.chunk(prompt=PROMPT, start=True)
        stream.send(["fly"])
        with pytest.raises(Refused, match=r"INVALID_ARGUMENT: ACTIONS\[0\]: "):
            stream.reply()
        stream.send(end=True)
        with pytest.raises(Refused, match="NOT_FOUND: "):
            stream.reply()
    assert metric(server, "fastar_streams_active") == 0


def refused_by_triton(stream: Stream, **kwargs) -> str:
    with pytest.raises((Refused, triton.InferenceServerException)) as refused:
        stream.chunk(**kwargs)
    return str(refused.value)


def test_what_triton_itself_refuses(server, expected):
    """In Triton's words, before the model sees it; the client package translates them."""
    with Stream(server.grpc_url) as live:
        frames = [live.chunk(["forward"], PROMPT, {"seed": 7}, start=True)[0]]
        with Stream(server.grpc_url) as stream:
            assert "must specify the START flag" in refused_by_triton(stream)
            numbers = triton.InferInput("ACTIONS", [1, 1], "INT32")
            numbers.set_data_from_numpy(np.zeros((1, 1), np.int32))
            others = [tensor("PROMPT", [PROMPT]), tensor("OPTIONS", [""])]
            assert "ACTIONS" in refused_by_triton(stream, start=True, inputs=[numbers, *others])
            assert "inputs" in refused_by_triton(stream, start=True, inputs=others)
            wide = tensor("PROMPT", [PROMPT, PROMPT])
            assert "PROMPT" in refused_by_triton(stream, start=True, inputs=[tensor("ACTIONS", [""]), wide, others[1]])
        frames += [live.chunk(["forward"])[0], live.chunk(["forward"], end=True)[0]]
    assert all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True))


def test_sequence_ids_are_numbers(server):
    with Stream(server.grpc_url, "a" * 127) as stream:
        stream.send(prompt=PROMPT, start=True, end=True)
        with pytest.raises(Refused, match="INVALID_ARGUMENT: sequence_id: "):
            stream.reply()


def test_an_ended_id_may_be_used_again_and_a_live_one_is_restarted(server, expected):
    sequence = 4711
    with Stream(server.grpc_url, sequence) as stream:
        for end in (True, False, False):
            frames, stats = stream.chunk(["forward"], PROMPT, {"seed": 7}, start=True, end=end)
            assert stats["chunk"] == 0
            assert np.array_equal(frames, expected[0])
            assert metric(server, "fastar_streams_active") == (0 if end else 1)
        assert np.array_equal(stream.chunk(["forward"], end=True)[0], expected[1])
        assert "must specify the START flag" in refused_by_triton(stream)


def test_one_stream_too_many_is_refused_and_takes_no_slot(server):
    capacity = int(metric(server, "fastar_streams_capacity"))
    streams = [Stream(server.grpc_url) for _ in range(capacity + 1)]
    try:
        for stream in streams[:-1]:
            stream.chunk(prompt=PROMPT, start=True)
        streams[-1].send(prompt=PROMPT, start=True)
        with pytest.raises(Refused, match="RESOURCE_EXHAUSTED: "):
            streams[-1].reply()
        streams[0].chunk(["end"], end=True)
        streams[-1].chunk(prompt=PROMPT, start=True, end=True)
    finally:
        for stream in streams[1:-1]:
            stream.chunk(["end"], end=True)
        for stream in streams:
            stream.close()
    assert until(lambda: metric(server, "fastar_streams_active") == 0, 5)
