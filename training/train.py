"""Trains the embedded world: play -> autoencoder -> transformer (true context, then its own) -> decoder on predictions.

    python -m training.train --out out/world       # 17 minutes on one H200; `--tiny`: a smoke run on any machine
    torchrun --nproc-per-node 4 -m training.train --out out/world --init WEIGHTS    # on four GPUs, from weights

Each stage saves to --out and is skipped when its file is there, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastar_backend.config import ModelConfig, SamplerConfig
from fastar_backend.evaluation.game import HELD_OUT, SCENARIOS
from fastar_backend.model.autoencoder import FrameAutoencoder, unit_rms
from fastar_backend.model.dit import CausalDiT
from fastar_backend.model.text import HashedWords
from training import autoencoder
from training.collect import collect
from training.parallel import WholeSequence
from training.prompts import sample_prompt
from training.ranks import Ranks

MODEL = ModelConfig(
    dim=256, layers=7, heads=4, ffn_dim=608, freq_dim=64, text_dim=64, text_tokens=64, latent_channels=48,
    latent_height=8, latent_width=12, patch=(1, 1, 1), action_dim=7, rope_theta=100.0, rope_max_distance=6,
    prediction="x0",
)  # fmt: skip
SAMPLER = SamplerConfig(
    steps=(1000.0, 750.0, 500.0), shift=3.0, context_noise=0.1, latent_frames_per_chunk=2, unit_latents=True
)
MOST_REPEATS = 16
RETURNS = 0.6  # share of the windows that are drawn for the places seen again in them
RETURN_WEIGHT = 3.0  # of a latent frame that shows a place again, in the loss
PROMPTS_EACH = 48  # phrasings drawn per scenario for one stage


class World(nn.Module):
    """All that is trained and shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = CausalDiT(MODEL)
        self.text = HashedWords(MODEL.text_dim, MODEL.text_tokens)
        self.autoencoder = FrameAutoencoder(MODEL.latent_channels)
        nn.init.zeros_(self.dit.head.head.weight)
        nn.init.normal_(self.dit.time_projection[1].weight, std=0.005)
        nn.init.normal_(self.text.table.weight, std=1.0)
        with torch.no_grad():
            self.text.table.weight[0] = 0


class Windows:
    """Random windows of the recorded play, on the device. A share of them cuts to another scenario half way, with the
    prompt, so that a prompt change during a stream is something the model has seen."""

    def __init__(self, data: dict[str, np.ndarray], latents: Tensor, device: torch.device, seed: int) -> None:
        self.latents, self.device = latents, device
        self.actions = torch.from_numpy(data["actions"]).to(device)
        self.scenario = torch.from_numpy(data["scenario"].astype(np.int64)).to(device)
        self.episode, self.since = data["episode"], data["since"]
        self.ago = torch.from_numpy(self.since).to(device)
        self.rng = np.random.default_rng(seed)
        self.starts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _starts(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows at which `frames` rows of one episode follow, and their cumulative odds by the places seen again."""
        if frames not in self.starts:
            rows = np.arange(len(self.episode) - frames + 1)
            seen = np.flatnonzero(self.since)  # such a frame is in the windows that begin from here to there, whole
            first, last = np.maximum(seen - frames + 1, 0), seen - self.since[seen]
            inside = first <= last
            count = np.bincount(first[inside], minlength=len(self.episode) + 1).astype(float)
            count -= np.bincount(last[inside] + 1, minlength=len(self.episode) + 1)
            starts = rows[self.episode[rows] == self.episode[rows + frames - 1]]
            self.starts[frames] = starts, count.cumsum()[starts].cumsum()
        return self.starts[frames]

    def _draw(self, batch: int, frames: int) -> np.ndarray:
        """[batch, frames]"""
        starts, odds = self._starts(frames)
        drawn = self.rng.choice(starts, batch)
        if odds[-1] > 0:
            chosen = starts[np.searchsorted(odds, self.rng.random(batch) * odds[-1], side="right")]
            drawn = np.where(self.rng.random(batch) < RETURNS, chosen, drawn)
        return drawn[:, None] + np.arange(frames)

    def sample(self, batch: int, frames: int, chunk: int, cut: float = 0.15):
        """rows [B, frames] into the table, and which of the two prompts (0 before the cut, 1 after) [B, frames]."""
        offsets = np.arange(frames)
        rows, other = self._draw(batch, frames), self._draw(batch, frames)
        at = np.where(self.rng.random(batch) < cut, chunk * self.rng.integers(1, frames // chunk, batch), frames)
        after = offsets >= at[:, None]
        rows = np.where(after, other, rows)
        rows, after = torch.from_numpy(rows).to(self.device), torch.from_numpy(after.astype(np.int64)).to(self.device)
        return rows, after, self.scenario[rows[:, 0]], self.scenario[rows[:, -1]]


class PromptTable:
    """Tokenised random phrasings per scenario; rows are drawn without leaving the device."""

    def __init__(self, text: HashedWords, device: torch.device, seed: int) -> None:
        rng = np.random.default_rng(seed)
        from fastar_backend.model.text import tokenise

        self.tokens = torch.zeros(len(SCENARIOS), PROMPTS_EACH, text.length, dtype=torch.long)
        for row, scenario in enumerate(SCENARIOS):
            for column in range(PROMPTS_EACH):
                found = tokenise(sample_prompt(scenario.name, rng), text.length)
                self.tokens[row, column, : len(found)] = torch.tensor(found)
        self.tokens = self.tokens.to(device)

    def __call__(self, text: HashedWords, scenario: Tensor) -> Tensor:
        """[B] -> [B, text_tokens, text_dim]; a word in twenty is replaced by a random one, a prompt in twenty is
        empty."""
        picked = torch.randint(PROMPTS_EACH, scenario.shape, device=scenario.device)
        tokens = self.tokens[scenario, picked]
        noise = torch.randint_like(tokens, 1, text.table.num_embeddings)
        tokens = torch.where((torch.rand_like(tokens, dtype=torch.float) < 0.05) & (tokens > 0), noise, tokens)
        return text.table(tokens * (torch.rand(len(tokens), 1, device=tokens.device) > 0.05))


def add_noise(clean: Tensor, sigma: Tensor) -> Tensor:
    s = sigma[..., None, None, None]
    return (1 - s) * clean + s * torch.randn_like(clean)


class Trainer:
    def __init__(self, world: World, windows: Windows, ranks: Ranks) -> None:
        self.world, self.windows, self.ranks, self.device = world, windows, ranks, ranks.device
        device = ranks.device
        self.shared = np.random.default_rng(3)  # what all processes decide alike, so that none waits for another
        self.prompts = PromptTable(world.text, device, 1)
        self.sequences: dict[int, WholeSequence] = {}
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        if device.type == "cuda":  # block by block: all layers share one compilation per window length
            torch._dynamo.config.cache_size_limit = 64
            for block in world.dit.blocks:
                block.compile(dynamic=False)

    def sequence(self, frames: int) -> WholeSequence:
        if frames not in self.sequences:
            self.sequences[frames] = WholeSequence(MODEL, frames, SAMPLER.latent_frames_per_chunk, self.device)
        return self.sequences[frames]

    def predict(self, sequence, prompts, context, context_sigma, noisy, sigma, actions) -> Tensor:
        """Clean latents [B, frames, C, h, w] predicted for the noisy half."""
        latents, sigmas = torch.cat([context, noisy], 1), torch.cat([context_sigma, sigma], 1)
        output = self.world.dit(latents, sigmas, torch.cat([actions, actions], 1), [sequence] * MODEL.layers, prompts)
        return output[:, context.shape[1] :].float()

    @torch.no_grad()
    def own_context(self, sequence, prompts, clean: Tensor, actions: Tensor, rounds: int) -> Tensor:
        """The model's own few-step predictions of all chunks at once, `rounds` times over: errors pile up in the
        context as they do in a rollout. Each round runs the sampler's first step and a random share of the others:
        cheaper than all, and the context's sharpness varies."""
        batch, frames = clean.shape[:2]
        context, chunk = clean, SAMPLER.latent_frames_per_chunk
        for _ in range(rounds):
            level = torch.full((batch, frames), SAMPLER.context_noise, device=self.device)
            noised = add_noise(context, level)
            x0 = torch.zeros_like(clean)
            for step, sigma in enumerate(SAMPLER.sigmas):
                if step and self.shared.random() < 0.5:
                    continue
                s = torch.full((batch, frames), sigma, device=self.device)
                x0 = self.predict(sequence, prompts, noised, level, add_noise(x0, s), s, actions)
            x0 = unit_rms(x0, 2)
            keep = torch.rand(batch, frames // chunk, device=self.device) < 0.15  # some chunks stay true
            keep = keep.repeat_interleave(chunk, 1)[..., None, None, None]
            context = torch.where(keep, clean, x0)
        return context

    def batch(self, size: int, frames: int):
        rows, after, first, last = self.windows.sample(size, frames, SAMPLER.latent_frames_per_chunk)
        clean = self.windows.latents[rows].float()
        actions = self.windows.actions[rows].float()
        return rows, clean, actions, after, (first, last)

    def condition(self, sequence, after, scenarios):
        text = torch.stack([self.prompts(self.world.text, s) for s in scenarios], 1)
        keys_values = self.world.dit.prompt_keys_values(text.flatten(0, 1))
        merged = [tuple(t.unflatten(0, (-1, 2)).flatten(1, 2) for t in pair) for pair in keys_values]
        return sequence.prompts(merged, after)

    def loss(self, size: int, frames: int, rounds: int) -> Tensor:
        sequence, chunk = self.sequence(frames), SAMPLER.latent_frames_per_chunk
        rows, clean, actions, after, scenarios = self.batch(size, frames)
        ago, position = self.windows.ago[rows], torch.arange(frames, device=self.device)
        again = (ago > 0) & (ago <= position) & (after == after[:, :1])
        with self.autocast:
            prompts = self.condition(sequence, after, scenarios)
            context = clean
            if rounds:
                context = self.own_context(sequence, prompts, clean, actions, rounds)
            # As if what lies beyond the temporal clamp had been seen many times: histories far longer than windows.
            repeats = torch.rand(size, device=self.device) * math.log(MOST_REPEATS)
            sequence.far_bias = repeats * (torch.rand(size, device=self.device) < 0.5)
            level = 0.3 * torch.rand(size, 1, device=self.device) * (torch.rand(size, 1, device=self.device) < 0.7)
            level = level.expand(size, frames) if not rounds else level.mul(2 / 3).expand(size, frames)
            u = torch.rand(size, frames // chunk, device=self.device)
            u = torch.where(torch.rand_like(u) < 0.3, torch.ones_like(u), u)  # few steps: pure noise matters most
            sigma = (SAMPLER.shift * u / (1 + (SAMPLER.shift - 1) * u)).repeat_interleave(chunk, 1)
            x0 = self.predict(
                sequence, prompts, add_noise(context, level), level, add_noise(clean, sigma), sigma, actions
            )
        weight = (1 + (RETURN_WEIGHT - 1) * again) / sigma.clamp(min=0.3)
        return ((x0 - clean).square().mean((2, 3, 4)) * weight).mean()

    def optimisers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for all else (Jordan et al. 2024; learning rates of one scale)."""
        matrices = [p for p in self.world.dit.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in [*self.world.dit.parameters(), *self.world.text.parameters()] if id(p) not in chosen]
        fused = self.device.type == "cuda"
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.02, fused=fused),
        ]

    def run(self, seconds: float, plan, rate: float, warm: int, log=print) -> dict[str, list]:
        """plan(progress 0..1, random numbers) -> (batch, frames, rounds). Leaves the averaged weights in the model."""
        parameters = [*self.world.dit.parameters(), *self.world.text.parameters()]
        optimisers = self.optimisers(rate)
        average = [p.detach().clone() for p in parameters]
        curves: dict[str, list] = {"step": [], "seconds": [], "loss": [], "frames": [], "rounds": []}
        began, step, recent = time.monotonic(), 0, []
        while (done := self.ranks.progress(step, began, seconds)) < 1:
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = rate * min(1, (step + 1) / warm) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * done)))
            size, frames, rounds = plan(done, self.shared)
            loss = self.loss(size, frames, rounds)
            loss.backward()
            self.ranks.average(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            decay = min(0.998, (step + 1) / (step + 20))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            step += 1
            recent.append(loss.detach())
            if step % 200 == 0 or step in (1, 20):
                value, elapsed = torch.stack(recent).mean().item(), time.monotonic() - began
                recent = []
                for name, item in zip(curves, (step, elapsed, value, frames, rounds), strict=True):
                    curves[name].append(round(item, 4))
                log(f"transformer {step}: {elapsed:.0f}s loss {value:.4f} window {size}x{frames} rounds {rounds}")
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)
        return curves

    @torch.no_grad()
    def predictions(self, size: int, frames: int) -> tuple[Tensor, Tensor]:
        """(rows [n], predicted latents [n, C, h, w]) as a stream would show them, for the decoder's last stage."""
        sequence = self.sequence(frames)
        rows, clean, actions, after, scenarios = self.batch(size, frames)
        with self.autocast:
            sequence.far_bias = torch.zeros(size, device=self.device)
            prompts = self.condition(sequence, after, scenarios)
            rounds = int(torch.randint(1, 3, ()))
            predicted = self.own_context(sequence, prompts, clean, actions, rounds)
        return rows.flatten(), predicted.flatten(0, 1)


def encode_all(model: FrameAutoencoder, frames: Tensor, device: torch.device) -> Tensor:
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        parts = [model.encode(autoencoder.to_video(part.to(device))).bfloat16() for part in frames.split(512)]
    return torch.cat(parts)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--init", type=Path, help="weights to go on from, on their own context")
    cli.add_argument("--latent-frames", type=int, default=25000, help="per scenario and process")
    cli.add_argument("--workers", type=int, default=15, help="per process")
    cli.add_argument("--seed", type=int, default=0, help="of the games; later ones than 69 are held out")
    cli.add_argument("--autoencoder-seconds", type=float, default=110)
    cli.add_argument("--context-seconds", type=float, default=390, help="stage 1: true context")
    cli.add_argument("--own-seconds", type=float, default=400, help="stage 2: the model's own context")
    cli.add_argument("--decoder-seconds", type=float, default=50)
    cli.add_argument("--until", choices=("autoencoder", "context", "own"), help="last stage, instead of the decoder's")
    cli.add_argument("--tiny", action="store_true")
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    ranks = Ranks()
    if not 0 <= args.seed <= HELD_OUT // 1000 - ranks.count:  # a process's games have a thousand seeds
        cli.error(f"--seed: got {args.seed}; allowed: 0..{HELD_OUT // 1000 - ranks.count}")
    device = ranks.device
    scale, short = (1, 4) if args.tiny else (8, 24)  # batch and window lengths
    began = time.monotonic()

    def log(text: str) -> None:
        if not ranks.rank:
            print(f"[{time.monotonic() - began:6.0f}s] {text}", flush=True)

    stored = args.out / "play.npz"
    if ranks.count == 1 and stored.exists():
        data = dict(np.load(stored))
    else:
        data = collect(args.latent_frames, args.workers, args.seed + ranks.rank)
        if ranks.count == 1:
            np.savez(stored, **data)
    log(f"{len(data['frames'])} latent frames, {data['episode'].max() + 1} episodes")
    frames = torch.from_numpy(data["frames"])
    if device.type == "cuda":
        frames = frames.to(device)

    world = World().to(device)
    torch.manual_seed(100 + ranks.rank)
    if args.init:
        world.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    world.autoencoder.to(memory_format=torch.channels_last)
    curves_path = args.out / "curves.json"
    curves = json.loads(curves_path.read_text()) if curves_path.exists() else {}

    def stage(name: str, work) -> None:
        path = args.out / f"{name}.safetensors"
        if args.init and name in ("autoencoder", "context"):
            return
        if path.exists():
            world.load_state_dict({k: v.float() for k, v in load_file(path).items()})
            return
        curves[name] = work()
        if ranks.rank:
            return
        state = {k: v.detach().half().cpu().contiguous() for k, v in world.state_dict().items()}
        save_file(state, path)
        curves_path.write_text(json.dumps(curves))
        log(f"{name} done")

    def autoencoder_stage():
        def batches():
            return frames[torch.randint(len(frames), (32 * scale,), device=frames.device)].to(device), None

        return autoencoder.train(
            world.autoencoder, batches, args.autoencoder_seconds, ranks, adversarial_from=0.45, log=log
        )

    stage("autoencoder", autoencoder_stage)
    if args.until == "autoencoder":
        return
    windows = Windows(data, encode_all(world.autoencoder, frames, device), device, seed=2 + ranks.rank)
    log(f"latents: mean {windows.latents.float().mean():.3f} std {windows.latents.float().std():.3f}")
    log(f"{(windows.since > 0).mean():.3f} of the latent frames show a place again")
    trainer = Trainer(world, windows, ranks)

    def context_plan(done: float, _: np.random.Generator):
        return (6 * scale, short, 0) if done < 0.75 else (2 * scale, 3 * short, 0)

    def own_plan(_: float, rng: np.random.Generator):  # long enough to turn away and back; one length, compiled once
        return 2 * scale, 2 * short, int(rng.choice(4, p=(0.5, 0.25, 0.15, 0.1)))

    stage("context", lambda: trainer.run(args.context_seconds, context_plan, 1e-3, 200, log))
    if args.until == "context":
        return
    stage("own", lambda: trainer.run(args.own_seconds, own_plan, 5e-4, 50, log))
    if args.until == "own":
        return

    def decoder_stage():
        pool: dict[str, Tensor] = {}

        def batches():
            if not pool or torch.rand(()) < 0.05:
                pool["rows"], pool["latents"] = trainer.predictions(2 * scale, 2 * short)
            picked = torch.randint(len(pool["rows"]), (24 * scale,), device=device)
            rows, latents = pool["rows"][picked], pool["latents"][picked]
            true = torch.rand(len(rows), 1, 1, 1, device=device) < 0.3
            target = frames[rows.to(frames.device)].to(device)
            return target, torch.where(true, windows.latents[rows].float(), latents)

        return autoencoder.train(world.autoencoder, batches, args.decoder_seconds, ranks, adversarial_from=0.1,
                                 encoder=False, learning_rate=4e-4, adversarial_weight=0.06, log=log)  # fmt: skip

    stage("decoder", decoder_stage)


if __name__ == "__main__":
    main()
