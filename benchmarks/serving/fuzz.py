"""Thousands of random requests at a running server: values, shapes, types, ids and order that no client would send.

    python -m benchmarks.serving.fuzz localhost:8001 --requests 10000

Nothing is asked of the replies but that they come, or that the call is refused; what is asked of the server (alive, no
slot leaked, memory steady) its owner checks.
"""

from __future__ import annotations

import json
import queue
import random
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc as triton
import typer
from tritonclient.utils import InferenceServerException

TEXTS = (
    *("", "end", "control", "forward", "forward+turn_left", "fly", "+", "a maze", " ", "\x00", "x" * 300, "x" * 5000),
    *("\ud7ff", "🜚" * 50, "{}", "[]", "null", "{", '{"seed": 1}', '{"seed": 1e999}', '{"fps": 24}', '{"fps": NaN}'),
    *('{"encoding": "jpeg"}', '{"encoding": "h264"}', '{"attention": {"kind": "dense"}}', '{"fork": {"token": ""}}'),
    *(
        '{"attention": {"budget_frames": 1000000}}',
        f'{{"resume": {{"token": "{"x" * 40}"}}}}',
        '{"id": 1, "rewind": 0}',
    ),
    *('{"id": 1, "pause": true}', '{"id": 1, "seed": 2}', '{"id": 2, "prompt": "a hall", "blend_chunks": 64}'),
    *('{"id": 1, "snapshot": true}', f'{{"id": {10**23}, "fps": 1}}', '{"id": -1}', "[" * 4000),
)
IN_FLIGHT = 6  # requests of one call before its replies are waited for


def value(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(40))
    return rng.choice(TEXTS).encode("utf-8", "surrogatepass")


def tensor(rng: random.Random, name: str) -> triton.InferInput:
    count = 1 if rng.random() < 0.85 else rng.randrange(0, 70)
    if rng.random() < 0.03:
        result = triton.InferInput(name, [1, max(count, 1)], "INT32")
        result.set_data_from_numpy(np.zeros((1, max(count, 1)), np.int32))
        return result
    shape = [1, count] if rng.random() < 0.97 else [rng.randrange(1, 3)] * rng.randrange(1, 4)
    values = np.array([value(rng) for _ in range(int(np.prod(shape)))], dtype=np.object_).reshape(shape)
    result = triton.InferInput(name, shape, "BYTES")
    result.set_data_from_numpy(values)
    if rng.random() < 0.02:
        result._raw_content = rng.randbytes(rng.randrange(40))
    return result


def request(rng: random.Random, first: bool) -> tuple[list[triton.InferInput], bool, bool]:
    """Inputs, start, end. Half of them are nearly right, so that they get far."""
    if rng.random() < 0.5:
        texts = {"ACTIONS": rng.choice(["", "forward", "end"]), "PROMPT": "a maze" if first else "", "OPTIONS": ""}
        if not first and rng.random() < 0.3:
            texts = {"ACTIONS": "control", "PROMPT": "", "OPTIONS": "", "CONTROL": rng.choice(TEXTS[-12:])}
        inputs = []
        for name, text in texts.items():
            part = triton.InferInput(name, [1, 1], "BYTES")
            part.set_data_from_numpy(np.array([[text.encode("utf-8", "surrogatepass")]], dtype=np.object_))
            inputs.append(part)
        return inputs, first, rng.random() < 0.1
    names = [name for name in ("ACTIONS", "PROMPT", "OPTIONS", "CONTROL") if rng.random() < 0.9]
    return [tensor(rng, name) for name in names or ["ACTIONS"]], rng.random() < 0.4, rng.random() < 0.2


def run(url: str, requests: int, seed: int, patience: float = 3.0) -> dict[str, int]:
    """How many were answered, refused (an error came back), lost (the call broke with them, or no reply came within
    `patience` seconds: those of a paused stream) and cancelled by us."""
    rng, counts = random.Random(seed), {"answered": 0, "refused": 0, "lost": 0, "cancelled": 0, "unsendable": 0}
    ids = [rng.randrange(1, 1 << 62) for _ in range(6)]  # used again and again, by several calls
    sent = 0
    while sent < requests:
        client, replies = triton.InferenceServerClient(url), queue.Queue()
        client.start_stream(lambda result, error, put=replies.put: put((result, error)))
        sequence, waiting = rng.choice([*ids, rng.randrange(1, 1 << 62)]), 0
        for index in range(min(rng.randrange(1, IN_FLIGHT), requests - sent)):
            sent += 1
            inputs, start, end = request(rng, index == 0)
            try:
                client.async_stream_infer(
                    "fastar", inputs, sequence_id=sequence, sequence_start=start, sequence_end=end
                )
                waiting += 1
            except (InferenceServerException, ValueError):  # the call is broken already
                counts["unsendable"] += 1
        vanish = rng.random() < 0.15
        while waiting and not vanish:
            try:
                _, error = replies.get(timeout=patience)
            except queue.Empty:
                counts["lost"] += waiting
                break
            waiting -= 1
            broken = error is not None and "StatusCode" in str(error.status() or "")
            counts["refused" if error is not None else "answered"] += 1
            if broken:  # a malformed message breaks the whole call
                counts["lost"] += waiting
                break
        else:
            counts["cancelled"] += waiting
        client.stop_stream(cancel_requests=True)
        client.close()
    return counts


def main(
    url: str,
    requests: Annotated[int, typer.Option(min=1)] = 10_000,
    seed: int = 1,
) -> None:
    result: dict[str, Any] = run(url, requests, seed)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
