"""The real engine over a tiny world, with failures that the real one does not have: it crashes, stalls and grows.

`install()` puts it where model.py imports the engine from; it is called inside Triton's model process only.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import tiny_world

from fastar_backend.config import AttentionConfig
from fastar_backend.engine import engine as module
from fastar_backend.errors import WeightsError
from fastar_backend.model.world import load_world

STATE_BYTES = 64 << 20  # that each stream holds


class StreamEngine(module.StreamEngine):
    @classmethod
    def load(cls, world="doom", device="cpu", attention=None, max_streams=8, *, deterministic=False, execution=None):
        if world != "doom":
            raise WeightsError(f"{world}: no checkpoint here")
        config = copy.deepcopy(tiny_world.CONFIG)
        config["buttons"], config["model"]["action_dim"] = ["forward", "turn_left", "crash", "stall"], 4
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_world(str(tiny_world.write(Path(folder) / "tiny", config)), "cpu")
        small = AttentionConfig(budget_frames=4, recent_frames=2)
        return cls(loaded, small, max_streams, deterministic=deterministic)

    def open(self, stream_id, prompt, options=None):
        super().open(stream_id, prompt, options)
        self.streams[stream_id].ballast = np.ones(STATE_BYTES, np.uint8)
        self.streams[stream_id].said = prompt

    def step(self, requests):
        actions = {action for request in requests for action in request.actions}
        if "crash" in actions:
            raise ZeroDivisionError(f"cannot divide {[self.streams[r.stream_id].said for r in requests]}")
        if "stall" in actions:
            time.sleep(3)
        return super().step(requests)


def install() -> None:
    module.StreamEngine = StreamEngine
