"""Trains the frame autoencoder: L1 and gradient loss, then a patch discriminator for texture."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar_backend.model.autoencoder import FrameAutoencoder, unit_rms
from training.ranks import Ranks


class Discriminator(nn.Module):
    def __init__(self, frames: int) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.spectral_norm
        widths = (3 * frames, 64, 128, 256)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video.flatten(1, 2))


def to_video(frames: Tensor) -> Tensor:
    """uint8 [N, frames, H, W, 3] -> float [N, frames, 3, H, W] in -1..1."""
    return frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    rows = (output.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    columns = (output.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    return (output - target).abs().mean() + 0.5 * (rows + columns)


def train(model: FrameAutoencoder, batches, seconds: float, ranks: Ranks, *, adversarial_from: float,
          encoder: bool = True, learning_rate: float = 1e-3, adversarial_weight: float = 0.03,
          log=print) -> dict[str, list]:  # fmt: skip
    """`batches()` gives (target uint8 [N, frames, H, W, 3], latents or None). With latents given (predictions of the
    transformer) or encoder=False only the decoder learns. Returns the logged curves."""
    device = next(model.parameters()).device
    judge = Discriminator(model.frames).to(device)
    ranks.same(judge.parameters())
    ranks.same(judge.buffers())
    learner = list(model.parameters()) if encoder else list(model.decoder.parameters())
    optimiser = torch.optim.AdamW(learner, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    judge_optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-4, betas=(0.5, 0.9))
    curves: dict[str, list] = {"step": [], "seconds": [], "l1": [], "psnr": [], "adversarial": []}
    began, step = time.monotonic(), 0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    while (done := ranks.progress(step, began, seconds)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, step / 100) * (1 - 0.95 * done)
        target, latents = batches()
        target = to_video(target)
        fooling = done > adversarial_from
        with autocast:
            if latents is None:
                latents = model.encode(target)
                noise = torch.rand(len(latents), 1, 1, 1, device=device) * 0.25
                latents = unit_rms(latents + noise * torch.randn_like(latents), 1)
            output = model.decode(latents)
            loss = reconstruction_loss(output.float(), target)
            score = torch.zeros((), device=device)
            if fooling:
                score = -judge(output).float().mean()
        (loss + adversarial_weight * score).backward()
        ranks.average(learner)
        nn.utils.clip_grad_norm_(learner, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if fooling:
            judge_optimiser.zero_grad(set_to_none=True)
            with autocast:
                real, fake = judge(target).float(), judge(output.detach()).float()
                judge_loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            judge_loss.backward()
            ranks.average(judge.parameters())
            judge_optimiser.step()
        step += 1
        if step % 200 == 0 or step == 1:
            psnr = -10 * torch.log10((output.detach().float() - target).square().mean() / 4).item()
            elapsed = time.monotonic() - began
            for name, value in zip(curves, (step, elapsed, loss.item(), psnr, score.item()), strict=True):
                curves[name].append(round(value, 4))
            log(f"autoencoder {step}: {elapsed:.0f}s loss {loss.item():.4f} psnr {psnr:.2f} adv {score.item():.3f}")
    return curves
