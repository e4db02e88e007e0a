"""What a training needs in memory and in work, counted on the meta device: nothing is allocated and no GPU is needed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from crfm_core import ResourceError
from crfm_core.generator.advice import memory_advice
from crfm_core.generator.weights import choose_trainable
from crfm_core.models.controls import build_network
from crfm_core.models.network import ControlNetwork
from crfm_core.settings import Control

GIB = 2**30

#: ``SD3Transformer2DModel``'s settings of Stable Diffusion 3.5 medium.
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip

#: How accelerate is set up so that training needs no more than is counted here. A weight is used once in a forward pass, so keeping
#: its bfloat16 copy until the pass ends only costs memory; DDP averages gradients where they are instead of in copies,
#: and need not send the position table (0.9 GB, the same in all processes) around at every step.
LEAN = [AutocastKwargs(cache_enabled=False), DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)]


@dataclass(frozen=True)
class TrainingMemory:
    """What one process of a training holds, in bytes, and the work of one micro-step.

    Attributes:
        control: the settings it was counted for.
        weights: parameters and buffers (the position table).
        gradients: of the weights that train.
        optimiser: its state.
        ema: averaged weights.
        activations: what autograd keeps for the backward pass of one micro-step, bfloat16 copies of weights included, at its peak;
            with FSDP also the weights that are gathered at once.
        flops: of one micro-step forward and backward, what checkpointing computes again included (a multiply-add is two).
    """

    control: Control
    weights: int
    gradients: int
    optimiser: int
    ema: int
    activations: int
    flops: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, of all that is in memory."""
        return {name: getattr(self, name) for name in ("weights", "gradients", "optimiser", "ema", "activations")}

    @property
    def total(self) -> int:
        """All parts together. They peak at different moments, so a step may need up to the gradients less: gradients grow in the
        backward pass while activations go (only with ``accumulate`` above 1 are both there at once)."""
        return sum(self.parts.values())


def meta_network(sizes: Mapping[str, Any], control: Control) -> ControlNetwork:
    """The scheme's network over an ``SD3Transformer2DModel`` with these settings, on the meta device."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**{name: value for name, value in sizes.items() if not name.startswith("_")})
        return build_network(transformer, control.scheme, control.initialisation, **control.scheme_options)


def training_memory(network: ControlNetwork, control: Control, latent: tuple[int, int, int], text_tokens: int = 333) -> TrainingMemory:
    """Count what training ``network`` as ``control`` says takes on a GPU, set up as in :data:`LEAN`.

    Counted are the tensors that the networks' own code saves for the backward pass, in the types that CUDA's autocast gives them, with
    attention by a flash kernel. Not counted: buffers of single operations, the CUDA context (about 0.5 GiB), the allocator's
    fragmentation, NCCL's buffers. ``compile`` saves less than is counted.

    Args:
        network: on the meta device, as :func:`meta_network` builds it; it is left as it is.
        latent: shape [C,h,w] of one latent.
        text_tokens: tokens of a prompt (77 + 256 for SD3).
    """
    network = copy.deepcopy(network)
    bf16 = control.precision == "bf16"
    with torch.device("meta"):
        choose_trainable(network, control)
        samples, config = control.batch_size, network.config
        inputs = {
            "hidden_states": torch.empty(samples, *latent),
            "encoder_hidden_states": torch.empty(samples, text_tokens, config.joint_attention_dim),
            "pooled_projections": torch.empty(samples, config.pooled_projection_dim),
            "timestep": torch.empty(samples),
            "mask_latents": torch.empty(samples, *latent),
        }
    shares = control.processes if control.parallel == "fsdp" else 1
    weights = _bytes(network.parameters()) // shares + _bytes(network.buffers())
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = _bytes(trained) // shares
    optimiser = sum(_optimiser_bytes(parameter.numel(), control.optimiser) for parameter in trained) // shares

    gathered = 0
    if shares > 1:
        if bf16:  # FSDP itself hands out weights in bfloat16
            nn.Module.to(network, torch.bfloat16)
        # The block at work, the next one on its way, and the buffer through which blocks come and their gradients go.
        gathered = 3 * max(_bytes(block.parameters()) for block in network.repeated_blocks())
    count = CudaCount([network], bf16)
    if control.gradient_checkpointing:
        network.enable_gradient_checkpointing(count.checkpointed)
    with count:
        velocity = network(**inputs, return_dict=False)[0]
        (velocity.float() - inputs["hidden_states"]).square().mean()
    return TrainingMemory(control, weights, gradients, optimiser, gradients if control.ema else 0, gathered + count.saved, count.flops)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimiser_bytes(elements: int, optimiser: str) -> int:
    """State of one tensor: two moments in float32 and a step, or in bytes with a float32 scale per 256 (bitsandbytes leaves
    tensors of less than 4096 elements in float32)."""
    if optimiser == "adamw":
        return 8 * elements + 4
    return 2 * elements + 8 * -(-elements // 256) if elements >= 4096 else 8 * elements


class CudaCount(TorchFunctionMode):
    """Counts, within its context, what CUDA would do of what runs on the meta device: bytes saved for the backward pass and FLOPs.

    The meta device has neither CUDA's attention kernel nor its autocast: both are put in place. Work is that of the products
    (a multiply-add is two), forward and backward, as torch's FlopCounterMode has it; a result that nothing reads is counted as if
    the backward pass went through it.

    Args:
        modules: whose own weights and buffers are not counted as saved.
        autocast: to bfloat16.
    """

    narrow = (F.linear, F.conv2d, F.scaled_dot_product_attention)
    wide = (F.layer_norm, torch.Tensor.pow, torch.rsqrt)

    def __init__(self, modules: Iterable[nn.Module], autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.own = {tensor.untyped_storage()._cdata for module in modules for tensor in (*module.parameters(), *module.buffers())}
        self.kept: dict[int, torch.UntypedStorage] = {}
        self.forward = self.backward = self.again = 0
        self.largest_block = 0

    @property
    def saved(self) -> int:
        """Bytes, at their peak: distinct storages, and those of the largest checkpointed block while it is run again."""
        return self.largest_block + sum(storage.nbytes() for storage in self.kept.values())

    @property
    def flops(self) -> int:
        return self.forward + self.backward + self.again

    def __enter__(self) -> CudaCount:
        self.hooks = self._keeping(self.kept)
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def _keeping(self, among: dict[int, torch.UntypedStorage]) -> saved_tensors_hooks:
        def keep(tensor: Tensor) -> Tensor:
            self._keep(tensor, among)
            return tensor

        return saved_tensors_hooks(keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor, among: dict[int, torch.UntypedStorage]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            among[storage._cdata] = storage  # held, so that no later storage gets its address

    def checkpointed(self, block: nn.Module, *arguments: Any) -> Any:
        """In place of torch's checkpointing: keep what that keeps, the block's inputs, and note what running it again takes."""
        inside: dict[int, torch.UntypedStorage] = {}
        before = self.forward
        with self._keeping(inside):
            outputs = block(*arguments)
        if inside:
            for argument in arguments:
                if isinstance(argument, Tensor):
                    self._keep(argument, self.kept)
            self.largest_block = max(self.largest_block, sum(storage.nbytes() for key, storage in inside.items() if key not in self.kept))
            self.again += self.forward - before
        return outputs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.autocast and func in self.narrow + self.wide:
            dtype = torch.bfloat16 if func in self.narrow else torch.float32
            args = [value.to(dtype) if isinstance(value, Tensor) else value for value in args]
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            work = 4 * query.numel() * key.shape[-2]
            self.forward += work
            if any(part.requires_grad for part in (query, key, value)):
                self.backward += work * 5 // 2  # four products, and the scores once more
            # Saves queries, keys, values, answers and one number per query and head.
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            tokens, weight = args[:2]
            work = 2 * result.numel() * weight[0].numel()
            self.forward += work
            self.backward += work * (tokens.requires_grad + weight.requires_grad)
        return result


def require_memory(memory: TrainingMemory, available_bytes: int, key: str) -> None:
    """Raise ResourceError when a training cannot fit: what it holds all the time exceeds the device, or all of it by more than a
    tenth (the total is an upper bound, see :attr:`TrainingMemory.total`).

    Args:
        available_bytes: memory of the device.
        key: of the settings, such as ``controls.triattention``; the message names what lowers which part.
    """
    constant = memory.total - memory.activations
    if constant <= available_bytes and memory.total <= 1.1 * available_bytes:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts.items() if size)
    raise ResourceError(
        f"{key}: training needs about {memory.total / GIB:.1f} GiB of GPU memory ({parts}), the device has "
        f"{available_bytes / GIB:.1f}; {memory_advice(memory.control, f'{key}.')}"
    )


@contextlib.contextmanager
def out_of_memory_explained(control: Control) -> Iterator[None]:
    """Turn an out-of-memory error of the device or the machine into a ResourceError that says which settings lower the need."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise ResourceError(f"training ran out of memory with batch_size {control.batch_size}; {memory_advice(control)}") from error
