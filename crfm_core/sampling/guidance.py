"""The velocity of a batch as the network gives it, with classifier-free guidance (Ho and Salimans, 2022) if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crfm_core.models.network import ControlNetwork


class GuidedVelocity:
    """The network's velocities of one batch of masks and prompts at every step of a run."""

    def __init__(
        self,
        network: ControlNetwork,
        sigmas: Sequence[float],
        mask: Tensor,
        prompt: tuple[Tensor, Tensor],
        negative: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
    ) -> None:
        """Args: ``sigmas`` the noise levels of the run, the last one (0) not used; ``mask`` latents [B, C, h, w] in the network's dtype;
        ``prompt`` embeddings [B, T, D] and pooled ones [B, P]; ``negative`` those that guidance leads away from, [1 or B, ...];
        ``scale`` 1, or no ``negative``, is no guidance."""
        self.network, self.scale = network, scale if negative else 1.0
        embeds, pooled = prompt
        if negative and scale > 1:
            embeds = torch.cat([negative[0].expand(len(mask), -1, -1), embeds])
            pooled = torch.cat([negative[1].expand(len(mask), -1), pooled])
            mask = torch.cat([mask, mask])
        times = torch.tensor([1000 * sigma for sigma in sigmas[:-1]], device=mask.device)
        self.prepared = network.prepare(embeds.to(mask), pooled.to(mask), times, mask)

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The velocity [B, C, h, w], in float32, of latents at the noise level of ``step``."""
        latents = latents.to(self.network.dtype)
        if self.scale == 1:
            return self.network.velocity(latents, self.prepared, step).float()
        unconditional, conditional = self.network.velocity(torch.cat([latents, latents]), self.prepared, step).float().chunk(2)
        return unconditional + self.scale * (conditional - unconditional)
