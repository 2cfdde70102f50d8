"""An optimizer that steps inside the backward pass, so that gradients never pile up (training_memory.md, sections 1.3 and 8).

State per parameter: momentum in 8 bits with one scale per block of 256, and a second moment factored over (O, I*kh*kw). Weights stay
in bfloat16 and are written with stochastic rounding: plain rounding would land about a tenth of an update of 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from backend.training.keyed import key

BLOCK = 256
BETA1 = 0.9
DECAY_POWER = 0.8  # beta2 at update t is 1 - t^-0.8 (Adafactor, arXiv 1804.04235, section 7.2)
EPSILON = 1e-30
CLIP_RMS = 1.0  # update clipping by its root mean square (section 6), per tensor and called so


class FusedFactoredAdam:
    """Updates each parameter as soon as its gradient is complete, then frees the gradient.

    parameters: (name, parameter, learning rate) of everything trained. Call ``begin`` before each backward pass; there is no step().
    Gradient accumulation is not possible with it: the batch is the true batch.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter, float]], *, weight_decay: float, seed: int) -> None:
        self._weight_decay, self._seed = weight_decay, seed
        self._update, self._factor = 0, 1.0
        self._state: dict[str, dict[str, torch.Tensor]] = {}
        self._handles = []
        for name, parameter, rate in parameters:
            self._state[name] = _empty_state(parameter)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name, rate)))

    def begin(self, update: int, factor: float) -> None:
        """Says which update comes (0-based, keys the rounding noise) and the schedule's factor on the learning rates."""
        self._update, self._factor = update, factor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as flat tensors ``{name}|{field}``."""
        return {f"{name}|{field}": value for name, state in self._state.items() for field, value in state.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts back what ``tensors`` gave. Raises KeyError for an unknown name."""
        for flat, value in tensors.items():
            name, _, field = flat.rpartition("|")
            self._state[name][field].copy_(value)

    def _hook(self, name: str, rate: float):  # type: ignore[no-untyped-def]
        def apply(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._step(name, parameter, rate * self._factor)
                parameter.grad = None

        return apply

    @torch.no_grad()
    def _step(self, name: str, parameter: torch.Tensor, rate: float) -> None:
        state = self._state[name]
        generator = torch.Generator(parameter.device).manual_seed(key(self._seed, "rounding/" + name, self._update))
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        update = _normalised(gradient, state, self._update + 1)
        update /= max(1.0, float(update.square().mean().sqrt()) / CLIP_RMS)
        momentum = dequantized(state["momentum"], state["scale"], parameter.shape)
        momentum.mul_(BETA1).add_(update, alpha=1 - BETA1)
        state["momentum"], state["scale"] = quantized(momentum, generator)
        weight = parameter.float()
        if parameter.ndim > 1:
            weight.mul_(1 - rate * self._weight_decay)
        weight.sub_(momentum, alpha=rate)
        parameter.copy_(stochastically_rounded(weight, generator) if parameter.dtype == torch.bfloat16 else weight)


def _empty_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    device, count = parameter.device, parameter.numel()
    blocks = -(-count // BLOCK)
    state = {
        "momentum": torch.zeros(blocks * BLOCK, dtype=torch.int8, device=device),
        "scale": torch.zeros(blocks, device=device),
    }
    if parameter.ndim > 1:
        rows = parameter.shape[0]
        return {**state, "row": torch.zeros(rows, device=device), "column": torch.zeros(count // rows, device=device)}
    return {**state, "square": torch.zeros(count, device=device)}


def _normalised(gradient: torch.Tensor, state: dict[str, torch.Tensor], t: int) -> torch.Tensor:
    """The gradient over the root of its running second moment; a convolution is viewed as (O, I*kh*kw)."""
    decay = 1.0 - t**-DECAY_POWER
    square = gradient.square() + EPSILON
    if gradient.ndim <= 1:
        state["square"].lerp_(square.reshape(-1), 1 - decay)
        return gradient * state["square"].rsqrt().view_as(gradient)
    flat = square.flatten(1)
    row = state["row"].lerp_(flat.mean(dim=1), 1 - decay)
    column = state["column"].lerp_(flat.mean(dim=0), 1 - decay)
    scaled = gradient.flatten(1) * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()[None]
    return scaled.view_as(gradient)


def quantized(values: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in 8 bits: int8 (padded to whole blocks) and one float32 scale per block of 256; rounded at random, so unbiased."""
    flat = values.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(dim=1) / 127.0
    steps = padded / scale.clamp_min(1e-38)[:, None]
    noise = torch.rand(steps.shape, generator=generator, device=values.device)
    return (steps + noise).floor_().clamp_(-127, 127).to(torch.int8).view(-1), scale


def dequantized(steps: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of ``quantized``, float32 in ``shape``."""
    return (steps.view(-1, BLOCK).float() * scale[:, None]).view(-1)[: shape.numel()].view(shape)


def stochastically_rounded(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the mean: 16 random bits are added below the cut."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=values.device, dtype=torch.int32)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
