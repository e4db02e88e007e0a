"""What training lowers: the flow-matching loss, and the same on fixed tiles at fixed noise, to compare weights by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from crfm_core.files import seed_of
from crfm_core.generator.held_out import LEVELS
from crfm_core.models.flow_schedule import sigma_of_uniform

#: Held-out tiles whose loss is taken together.
TOGETHER = 8


def flow_losses(
    network: nn.Module,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    text: Tensor,
    pooled: Tensor,
    mask: Tensor | None,
    present: Tensor | None = None,
) -> Tensor:
    """Each sample's flow-matching loss, [B]: the mean over its elements of (net(z_sigma) - (noise - clean))^2.

    Args:
        clean, noise: normalised latents, [B,C,h,w].
        sigma: noise levels, [B].
        text, pooled: prompt embeddings [B,T,D] and [B,P].
        mask: mask latents [B,C,h,w]; None ignores the mask.
        present: which samples have a mask, [B]; None: all.
    """
    level = sigma.view(-1, 1, 1, 1)
    velocity = network(
        hidden_states=(1 - level) * clean + level * noise,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=1000 * sigma,
        mask_latents=mask,
        return_dict=False,
        **({} if present is None else {"mask_present": present}),
    )[0]
    return (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def losses_by_level(
    network: nn.Module, clean: Tensor, text: Tensor, pooled: Tensor, mask: Tensor | None, shift: float, device: str, seed: int = 0
) -> Iterator[tuple[float, float]]:
    """Evenly spread training noise levels, and the mean loss of these tiles at each.

    The noise follows from ``seed`` alone, so that weights can be laid side by side. Arguments as of :func:`flow_losses`, wherever they lie;
    ``shift`` is the scheduler's, ``device`` where the network is.
    """
    for index, level in enumerate(sigma_of_uniform((torch.arange(LEVELS) + 0.5) / LEVELS, shift)):
        generator = torch.Generator().manual_seed(seed_of("validation noise", seed, index))
        inputs = {"clean": clean, "noise": torch.randn(clean.shape, generator=generator), "sigma": level.expand(len(clean))}
        inputs |= {"text": text, "pooled": pooled}
        losses = []
        for start in range(0, len(clean), TOGETHER):
            part = {name: value[start : start + TOGETHER].to(device, torch.float32) for name, value in inputs.items()}
            own_mask = None if mask is None else mask[start : start + TOGETHER].to(device, torch.float32)
            losses.append(flow_losses(network, **part, mask=own_mask))
        yield level.item(), torch.cat(losses).mean().item()
