"""Which weights a preset trains, the LoRA beside them, their moving average, and what of all that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from backend.config import TrainConfig
from backend.training import presets
from backend.training.models import lora
from backend.training.models.stage2_unet import HairInpaintingUNet
from backend.training.sharding import gathered, load_whole, part_of, whole

ADAPTER = "default"
_A, _B, _BASE = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight", ".base_layer"


def choose_trained(model: HairInpaintingUNet, train: TrainConfig) -> None:
    """Freezes what the preset does not train; ``lora`` adds float32 adapters of ``train.lora_rank`` (arXiv 2106.09685), alpha = rank.

    conv_in and the injector learn in every preset: they carry what the base has never seen.
    """
    trains = presets.of(train).trains
    if trains == "all":
        return
    model.unet.requires_grad_(False)
    if trains == "lora":
        from peft import LoraConfig

        model.unet.add_adapter(
            LoraConfig(r=train.lora_rank, lora_alpha=train.lora_rank, init_lora_weights="gaussian", target_modules=list(lora.TARGETS)),
            ADAPTER,
        )
        for name, parameter in model.unet.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
    else:
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(".attn1." in name or ".attn2." in name)
    model.unet.conv_in.requires_grad_(True)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def deployable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's ``state_dict`` with every adapter merged into its weight (``lora.merged``), under the weight's own name."""
    merged = {}
    for name, value in tensors.items():
        if ".lora_" in name:
            continue
        if name.endswith(f"{_BASE}.weight"):
            layer = name.removesuffix(f"{_BASE}.weight")
            value = lora.merged(value, tensors[layer + _B], tensors[layer + _A])  # noqa: PLW2901
        merged[name.replace(_BASE, "")] = value
    return merged


def adapters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA in what a checkpoint needs for a resume, named as in ``models.lora``; empty for the other presets.

    Averaged where the run keeps an average: the adapters are those that the checkpoint's own weights were merged with.
    """
    found: dict[str, torch.Tensor] = {}
    for kind in ("weight", "ema"):
        for layer, part in ((_A, lora.DOWN), (_B, lora.UP)):
            end = f"{layer}|{kind}"
            found |= {f"{n.removeprefix('unet.').removesuffix(end)}.{part}": v for n, v in state.items() if n.endswith(end)}
    return found


class MovingAverage:
    """The exponential moving average of the trained weights, float32 on the CPU.

    decay: per step; with ``every`` steps between looks the average moves as far as it would in that many. keep: false in a process that
    only helps to put spread weights together; it has no ``values``.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, decay: float, every: int, keep: bool = True) -> None:
        self._parameters, self._decay, self._every, self._keep = dict(parameters), decay, every, keep
        self.values = {name: value.float().cpu().clone() for name, value in self._whole()}

    def _whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            value = whole(parameter.detach())
            if self._keep:
                yield name, value

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the ``step``-th step (1-based)."""
        if step % self._every == 0:
            for name, value in self._whole():
                self.values[name].lerp_(value.float().cpu(), 1.0 - self._decay**self._every)


def checkpoint_tensors(
    model: HairInpaintingUNet, average: MovingAverage | None, *, keep: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a checkpoint holds of the weights: (usable by themselves, needed besides for a resume).

    The first are merged and averaged, so evaluation, export and train.start know neither LoRA nor EMA. The second are the trained tensors
    as they are, ``{name}|weight``, and the average, ``{name}|ema``, where the first do not hold them. keep: false in a process that only
    helps to put spread weights together; it gets nothing.
    """
    tensors = gathered(model.state_dict(), keep=keep)
    if not keep:
        return {}, {}
    resume: dict[str, torch.Tensor] = {}
    if average is not None or any(name.endswith(_A) for name in tensors):
        resume = {f"{name}|weight": tensors[name] for name in trained(model)}
    if average is not None:
        resume |= {f"{name}|ema": value for name, value in average.values.items()}
        tensors |= {name: value.to(tensors[name].dtype) for name, value in average.values.items()}
    return deployable(tensors), resume


def restore(
    model: HairInpaintingUNet, average: MovingAverage | None, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Puts back what ``checkpoint_tensors`` gave and returns the rest of ``state``, which is the optimizer's.

    Weights that are not trained come from the base, which the model must have been built from.
    """
    own = {name.removesuffix("|weight"): value for name, value in state.items() if name.endswith("|weight")}
    if own:
        parameters = trained(model)
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(part_of(value, parameters[name]))
    else:
        load_whole(model, weights)
    if average is not None:
        average.values = {name: state[f"{name}|ema"].clone() for name in average.values}
    return {name: value for name, value in state.items() if not name.endswith(("|weight", "|ema"))}
