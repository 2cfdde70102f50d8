"""Stage 2's memory presets: what each trains, in which precision and with which optimizer (training_memory.md, section 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from backend.config import TrainConfig
from backend.errors import DeepHairError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Preset:
    """One way to fit the training into memory.

    bf16: the UNet's weights are bfloat16, written with stochastic rounding; else float32. trains: which of the UNet's weights learn (the
    injector always does, in float32). inside_backward: the optimizer steps inside the backward pass, so gradients are never all there.
    momentum: 8-bit momentum beside the factored second moment. adamw: plain AdamW in float32 instead. autocast: bfloat16 arithmetic over
    float32 weights. offload: weights, gradients and states lie in host memory (``offload``). card_gib: the size of card that it is made
    for. smaller: what to try when memory runs out.
    """

    bf16: bool
    trains: Literal["all", "attention", "lora"]
    inside_backward: bool
    momentum: bool
    adamw: bool
    autocast: bool
    offload: bool
    card_gib: int
    smaller: str | None


PRESETS: dict[str, Preset] = {
    "full-exact": Preset(False, "all", False, True, True, False, True, 8, None),
    "full-80gb": Preset(False, "all", False, True, True, True, False, 80, "full-12gb"),
    "full-12gb": Preset(True, "all", True, True, False, False, False, 12, "full-8gb"),
    "full-8gb": Preset(True, "all", True, False, False, False, False, 8, None),
    "partial": Preset(True, "attention", False, True, False, False, False, 12, "lora"),
    "lora": Preset(True, "lora", False, True, False, False, False, 8, None),
}


def of(train: TrainConfig) -> Preset:
    """The chosen preset."""
    return PRESETS[train.preset]


def sharded(train: TrainConfig, processes: int) -> bool:
    """Whether several processes share one set of weights (FSDP) instead of holding one each: where everything learns in float32."""
    return processes > 1 and of(train).adamw


def offloaded(train: TrainConfig, device: torch.device, processes: int) -> bool:
    """Whether the UNet's weights, gradients and states stay in host memory. On a CPU they are there anyway; several processes share them out."""
    return of(train).offload and device.type == "cuda" and processes == 1


def out_of_memory(train: TrainConfig, error: BaseException) -> DeepHairError:
    """The error for a person when the device's memory ran out: what ran out, and the preset or setting to try next."""
    steps = []
    if train.batch_size > 1:
        split = "" if of(train).inside_backward else f" train.accumulate={train.accumulate * train.batch_size}"
        steps.append(f"train.batch_size=1{split}")
    if not train.gradient_checkpointing:
        steps.append("train.gradient_checkpointing=true")
    if (smaller := of(train).smaller) is not None:
        steps.append(f"train.preset={smaller}")
    steps += ["train.texture_every=0"] if train.texture_every else []
    if smaller is None:
        steps.append("a smaller data.resolution (Stage 0 and the caches are then made anew)")
    return DeepHairError(
        f"the device's memory is not enough for preset {train.preset} at batch {train.batch_size}: {str(error).splitlines()[0]}",
        hint=f"try {', then '.join(steps)}; 'deephair train --dry-run' shows the plan of each; the last checkpoint is intact",
        code="out_of_memory",
    )
