"""One chunk at a time: the caches hold true history (or, for a world without a game, the dense rollout's), and now and
then the next chunk is predicted from the same noise under each policy. So nothing but the attention differs. Recall
and density are measured in every pass of every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastar_backend.engine.stream import Stream
from fastar_backend.evaluation.lab import Lab, flat
from fastar_backend.evaluation.scenes import Scene, write_arrays
from fastar_backend.evaluation.store import Unit

FIRST = 8  # chunks of history before the first prediction


def measure_forced(lab: Lab, unit: Unit) -> dict[str, Any]:
    """Rows, one for each predicted chunk; `recall` and `by_pass` (density) are [layers][passes], the last pass writes.
    Raises OSError where dense attention's predictions are missing."""
    scene = lab.scene(unit)
    path, dense = lab.store.reference(f"forced-{scene.name}"), unit.policy == "dense"
    known: dict[str, np.ndarray] = {}
    if not dense:
        with np.load(path) as file:
            known = {name: file[name] for name in file.files}
    stream = lab.open(scene, unit.policy, recall=True)
    size, sizes = lab.chunk_latents, lab.settings.sizes
    history = _history(lab, scene, known)
    known_latents = len(scene.actions) if history is None else history.shape[1]
    chunks = min(sizes.forced_latents, known_latents) // size
    wanted = set(range(chunks - 1, FIRST - 1, -sizes.forced_every))
    rows, made = [], {}
    for chunk in range(chunks):
        part = slice(chunk * size, (chunk + 1) * size)
        move = lab.actions(scene.actions[part])
        begun = chunk in wanted or history is None
        for probe in stream.probes:
            probe.measuring = chunk in wanted
        if begun:
            latents, video = lab.predict(stream, move)
        if history is not None:
            latents = history[:, part]
        elif not dense:
            raise FileNotFoundError(path)
        else:
            made.setdefault("latents", []).append(latents)
        lab.tell(stream, latents, move, begun)
        if chunk in wanted:
            row = {
                "chunk": chunk,
                "history": chunk * size,
                **attention_of(stream, len(lab.engine.world.config.sampler.sigmas)),
            }
            if dense:
                made[f"chunk{chunk}"] = video
            else:
                row["dense"] = lab.compare(video, known[f"chunk{chunk}"])
            if scene.frames is not None:
                row["truth"] = lab.compare(video, flat(scene.frames[part]))
            rows.append(row)
    lab.engine.close(1)
    if dense:
        if "latents" in made:
            made["latents"] = torch.cat(made["latents"], 1).float().cpu().numpy()
        write_arrays(path, made)
    return {"rows": rows}


def _history(lab: Lab, scene: Scene, known: dict[str, np.ndarray]) -> Tensor | None:
    """Latents [1, n, C, h, w] of the history; None: dense attention is making it."""
    if scene.frames is not None:
        return lab.encode(scene.frames[: lab.settings.sizes.forced_latents])
    if "latents" not in known:
        return None
    return torch.from_numpy(known["latents"]).to(lab.engine.device, lab.engine.dtype)


def attention_of(stream: Stream, steps: int) -> dict[str, Any]:
    """Of the chunk just written. density: executed query-key pairs of all passes over what dense attention has in as
    many as a chunk takes (a pass that was left out counts as not executed)."""
    layers = [probe.passes for probe in stream.probes]
    each = max((done.possible for passes in layers for done in passes), default=1)
    executed = sum(done.executed for passes in layers for done in passes)
    return {
        "recall": [[round(done.recall, 5) for done in passes] for passes in layers],
        "by_pass": [[round(done.executed / done.possible, 5) for done in passes] for passes in layers],
        "density": executed / (each * (steps + 1) * len(layers)),
        "tokens": stream.caches.stats().tokens,
        "text_tokens": float(sum(float(text.kept) for text in stream.text) / len(stream.text)),
    }
