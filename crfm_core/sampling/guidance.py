"""The velocity of a batch as the network gives it, guided by the prompt and by the mask if wanted.

Guidance by the prompt is classifier-free guidance (Ho and Salimans, 2022), that by the mask adds its own term as InstructPix2Pix does for
its two conditions (arXiv 2211.09800).
"""

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
        mask_scale: float = 1.0,
    ) -> None:
        """With v₀ the velocity without both, v_t with the prompt and v_tm with prompt and mask, the velocity is v₀ + ``scale`` (v_t - v₀)
        + ``mask_scale`` (v_tm - v_t), each new one at the cost of a pass. Without guidance by the mask the mask is in v₀ too.

        Args: ``sigmas`` the noise levels of the run, the last one (0) not used; ``mask`` latents [B, C, h, w] in the network's dtype;
        ``prompt`` embeddings [B, T, D] and pooled ones [B, P]; ``negative`` those that guidance leads away from, [1 or B, ...];
        ``scale`` 1, or no ``negative``, is no guidance by the prompt; ``mask_scale`` 1 is none by the mask."""
        self.network, self.scale, self.mask_scale = network, scale if negative else 1.0, mask_scale
        times = torch.tensor([1000 * sigma for sigma in sigmas[:-1]], device=mask.device)
        embeds, pooled = (part.to(mask) for part in prompt)
        masked: Tensor | None = mask
        if mask_scale > 1:
            self.with_mask, masked = network.prepare(embeds, pooled, times, mask), None
        if negative and scale > 1:
            embeds = torch.cat([negative[0].expand(len(mask), -1, -1).to(mask), embeds])
            pooled = torch.cat([negative[1].expand(len(mask), -1).to(mask), pooled])
            masked = None if masked is None else torch.cat([mask, mask])
        self.prepared = network.prepare(embeds, pooled, times, masked)

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The velocity [B, C, h, w], in float32, of latents at the noise level of ``step``."""
        latents = latents.to(self.network.dtype)
        if self.scale == 1:
            guided = prompted = self.network.velocity(latents, self.prepared, step).float()
        else:
            unconditional, prompted = self.network.velocity(torch.cat([latents, latents]), self.prepared, step).float().chunk(2)
            guided = unconditional + self.scale * (prompted - unconditional)
        if self.mask_scale == 1:
            return guided
        return guided + self.mask_scale * (self.network.velocity(latents, self.with_mask, step).float() - prompted)
