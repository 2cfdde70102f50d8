"""An optimizer that steps inside the backward pass, so that gradients never pile up (training_memory.md, sections 1.3 and 8).

State per parameter: momentum in 8 bits with one scale per block of 256, and a second moment factored over (O, I*kh*kw). Weights stay
in bfloat16 and are written with stochastic rounding: plain rounding would land about a tenth of an update of 1e-5. The arithmetic is
defined here in eager PyTorch; on cards with Triton the kernels of ``lowmem_kernels`` do the same.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from backend.training import philox
from backend.training.keyed import key

if TYPE_CHECKING:
    from backend.training.lowmem_kernels import Entry, Group

logger = logging.getLogger(__name__)

BLOCK = 256
BETA1 = 0.9
DECAY_POWER = 0.8  # beta2 at update t is 1 - t^-0.8 (Adafactor, arXiv 1804.04235, section 7.2)
EPSILON = 1e-30
CLIP_RMS = 1.0  # bound on an update's root mean square (section 6), per tensor and called so
GROUP_BYTES = 64 * 2**20  # gradients that wait for a common launch
TRITON_CAPABILITY = (8, 0)  # bfloat16 arithmetic
NORM = "clipping|previous_square"  # the state's name for the squared gradient norm of the update before

Arithmetic = Literal["auto", "triton", "eager"]
Hook = Callable[[torch.Tensor], None]
_State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Slot:
    """A trained tensor with its state and settings."""

    name: str
    parameter: torch.nn.Parameter
    state: _State
    rate: float
    weight_decay: float
    key: int


class FusedFactoredAdam:
    """Updates each parameter as soon as its gradient is complete, then frees the gradient.

    parameters: (name, parameter, learning rate) of everything trained. Before each backward pass call ``begin``, after it ``end``; there
    is no step(). Gradient accumulation is not possible with it: the batch is the true batch. weight_decay is decoupled (AdamW) and
    spares vectors.

    clip_norm: None bounds each update's root mean square to 1 (Adafactor, section 6). A number bounds the global gradient norm instead,
    by that of the update before, since this one's is known only when it is too late.

    momentum: without it an update follows the normalised gradient alone, and the state is the factored second moment.

    arithmetic: "triton" for the kernels, "eager" for PyTorch's operations, "auto" for the kernels where the device can run them.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter, float]],
        *,
        weight_decay: float,
        seed: int,
        clip_norm: float | None = None,
        momentum: bool = True,
        arithmetic: Arithmetic = "auto",
    ) -> None:
        self._clip_norm, self._beta1 = clip_norm, BETA1 if momentum else 0.0
        self._update, self._factor = 0, 1.0
        self._slots: dict[str, Slot] = {}
        self._waiting: dict[tuple[torch.dtype, bool], list[tuple[Slot, torch.Tensor]]] = {}
        self._groups: dict[tuple[tuple[str, int], ...], Group] = {}
        for name, parameter, rate in parameters:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            slot = Slot(name, parameter, _empty_state(parameter, momentum), rate, decay, key(seed, "rounding/" + name))
            self._slots[name] = slot
            parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name))
        device = next(iter(self._slots.values())).parameter.device
        self._device = device
        self._triton = triton_runs_on(device) if arithmetic == "auto" else arithmetic == "triton"
        self._square, self._previous_square = torch.zeros((), device=device), torch.zeros((), device=device)
        self._scale = torch.ones((), device=device)

    @property
    def arithmetic(self) -> Arithmetic:
        """Which implementation runs, "triton" or "eager"."""
        return "triton" if self._triton else "eager"

    def begin(self, update: int, factor: float) -> None:
        """Says which update comes (0-based, keys the rounding noise) and the schedule's factor on the learning rates."""
        self._update, self._factor = update, factor
        self._waiting.clear()
        self._square.zero_()
        if self._clip_norm is not None:
            ratio = self._clip_norm / (self._previous_square.sqrt() + 1e-6)
            self._scale = torch.where(self._previous_square > 0, ratio.clamp(max=1.0), torch.ones_like(ratio))

    def end(self) -> None:
        """Updates what still waits. Call after the backward pass."""
        for waiting in self._waiting.values():
            self._launch(waiting)
        self._waiting.clear()
        self._previous_square.copy_(self._square)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as flat tensors ``{name}|{field}``."""
        flat = {f"{slot.name}|{field}": value for slot in self._slots.values() for field, value in slot.state.items()}
        return {**flat, NORM: self._previous_square}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts back what ``tensors`` gave. Raises KeyError for an unknown name."""
        for flat, value in tensors.items():
            name, _, field = flat.rpartition("|")
            (self._previous_square if flat == NORM else self._slots[name].state[field]).copy_(value)

    def receive(self, name: str, gradient: torch.Tensor) -> None:
        """Takes the gradient that a backward pass has brought for a parameter."""
        self._take(self._slots[name], gradient)

    def _take(self, slot: Slot, gradient: torch.Tensor) -> None:
        """Updates a tensor, at once or with its group."""
        if self._triton and _suits_kernel(slot.parameter, gradient := gradient.to(slot.parameter.dtype)):
            self._wait(slot, gradient)
        else:
            self._square += self._step(slot, gradient)

    def _wait(self, slot: Slot, gradient: torch.Tensor) -> None:
        """Keeps a gradient until its group is large enough. Rows of a multiple of 16 elements load faster and go together."""
        waiting = self._waiting.setdefault((gradient.dtype, slot.state["column"].numel() % 16 == 0), [])
        waiting.append((slot, gradient))
        if sum(g.nbytes for _, g in waiting) >= GROUP_BYTES:
            self._launch(waiting)
            waiting.clear()

    def _launch(self, waiting: list[tuple[Slot, torch.Tensor]]) -> None:
        from backend.training import lowmem_kernels as kernels

        if not waiting:
            return
        place = tuple((slot.name, slot.parameter.data_ptr()) for slot, _ in waiting)
        if place not in self._groups:
            self._groups[place] = kernels.Group([_entry(slot) for slot, _ in waiting], BLOCK)
        self._square += kernels.update(
            self._groups[place], [gradient for _, gradient in waiting], number=self._update, factor=self._factor,
            blend=_blend(self._update), beta1=self._beta1, epsilon=EPSILON,
            clip_rms=CLIP_RMS if self._clip_norm is None else 0.0, gradient_scale=self._scale,
        )  # fmt: skip

    @torch.no_grad()
    def _step(self, slot: Slot, raw: torch.Tensor) -> torch.Tensor:
        """One tensor's update in eager PyTorch; returns the sum of its squared gradients."""
        state, parameter = slot.state, slot.parameter
        noise = _noise(parameter, slot.key, self._update)
        gradient = raw.float()
        square = gradient.square().sum()
        update = _normalised(gradient * self._scale, state, _blend(self._update))
        if self._clip_norm is None:
            update /= (update.square().mean().sqrt() / CLIP_RMS).clamp_min(1.0)
        momentum = self._averaged(update, state, noise)
        weight = parameter.float()
        # The decay joins the step before the subtraction: lr * decay alone is below float32's resolution of a weight.
        weight = weight.sub(momentum.add_(weight, alpha=slot.weight_decay), alpha=slot.rate * self._factor)
        parameter.copy_(stochastically_rounded(weight, noise & 0xFFFF) if parameter.dtype == torch.bfloat16 else weight)
        return square

    def _averaged(self, update: torch.Tensor, state: _State, noise: torch.Tensor) -> torch.Tensor:
        """The momentum with the update in it, which is kept; the update itself where there is none."""
        if not self._beta1:
            return update
        momentum = dequantized(state["momentum"], state["scale"], update.shape)
        momentum.mul_(self._beta1).add_(update, alpha=1 - self._beta1)
        steps, scale = quantized(momentum, noise >> 16)
        state["momentum"].copy_(steps)
        state["scale"].copy_(scale)
        return momentum


def _hook(optimizer: weakref.ref[FusedFactoredAdam], name: str) -> Hook:
    """What a parameter does with its gradient. It holds no reference back to the optimizer, which holds the parameter: that circle leads through
    C++, where Python's collector does not see it, and kept 7 GiB on the card after training."""

    def apply(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and (alive := optimizer()) is not None:
            alive.receive(name, gradient)

    return apply


def triton_runs_on(device: torch.device) -> bool:
    """Whether the kernels run there: a CUDA card of compute capability 8.0 or newer, Triton installed, and what Triton needs to build."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return False
    return importlib.util.find_spec("triton") is not None and _triton_builds()


@functools.cache
def _triton_builds() -> bool:
    """Whether Triton can build its part of the driver, for which it calls a C compiler with Python's headers; a warning where it cannot."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:  # noqa: BLE001 - the compiler's, the linker's, the driver's: whatever it is, the kernels cannot run
        logger.warning(
            "Triton cannot build its kernels (%s): the optimizer computes in PyTorch's own operations, which is slower and takes more memory; "
            "install a C compiler and Python's headers (Ubuntu: sudo apt install gcc python3-dev)",
            (str(error).strip().splitlines() or [type(error).__name__])[-1],
        )
        return False
    return True


def _suits_kernel(parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
    usual = gradient.dtype == parameter.dtype and parameter.dtype in (torch.bfloat16, torch.float32)
    return usual and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (parameter, gradient))


def _entry(slot: Slot) -> Entry:
    from backend.training.lowmem_kernels import Entry

    return Entry(slot.parameter.detach(), **slot.state, rate=slot.rate, weight_decay=slot.weight_decay, key=slot.key)


def _empty_state(parameter: torch.Tensor, momentum: bool) -> _State:
    """Zeros; a vector is a matrix of one row, whose factored second moment is the plain one."""
    device, count = parameter.device, parameter.numel()
    blocks = -(-count // BLOCK) if momentum else 0
    rows = parameter.shape[0] if parameter.ndim > 1 else 1
    return {
        "momentum": torch.zeros(blocks * BLOCK, dtype=torch.int8, device=device),
        "scale": torch.zeros(blocks, device=device),
        "row": torch.zeros(rows, device=device),
        "column": torch.zeros(count // rows, device=device),
    }


def _blend(update: int) -> float:
    """The share of the new square in the second moments at a 0-based update: 1 - beta2."""
    return float(update + 1) ** -DECAY_POWER


def _normalised(gradient: torch.Tensor, state: _State, blend: float) -> torch.Tensor:
    """The gradient over the root of its running second moment; a convolution is viewed as (O, I*kh*kw)."""
    matrix = gradient.view(state["row"].numel(), -1)
    square = matrix.square()
    row = state["row"].lerp_(square.mean(dim=1) + EPSILON, blend)
    column = state["column"].lerp_(square.mean(dim=0) + EPSILON, blend)
    return (matrix * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()[None]).view_as(gradient)


def _noise(parameter: torch.Tensor, slot_key: int, update: int) -> torch.Tensor:
    """A random 32-bit number (int64) per element, in the parameter's shape.

    On the CPU the kernels' own numbers; a card without the kernels draws from its own generator, which is faster there.
    """
    if parameter.device.type == "cpu":
        return philox.noise(parameter.numel(), slot_key, update).view(parameter.shape)
    generator = torch.Generator(parameter.device).manual_seed(slot_key + update)
    return torch.randint(1 << 32, parameter.shape, generator=generator, device=parameter.device)


def quantized(values: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in 8 bits: int8 (padded to whole blocks) and one float32 scale per block of 256; rounded at random, so unbiased.

    noise: integers in [0, 2^16) in the shape of ``values``.
    """
    padded, dither = (
        torch.nn.functional.pad(tensor.reshape(-1).float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK) for tensor in (values, noise)
    )
    scale = padded.abs().amax(dim=1) / 127.0
    steps = padded / scale.clamp_min(1e-38)[:, None]
    return (steps + (dither + 0.5) / 65536.0).floor_().clamp_(-127, 127).to(torch.int8).view(-1), scale


def dequantized(steps: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of ``quantized``, float32 in ``shape``."""
    return (steps.view(-1, BLOCK).float() * scale[:, None]).view(-1)[: shape.numel()].view(shape)


def stochastically_rounded(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the mean: 16 random bits are added below the cut.

    noise: integers in [0, 2^16) in the shape of ``values``.
    """
    bits = values.contiguous().view(torch.int32) + noise.to(torch.int32)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
