"""The deployed UNet for other tools: as a diffusers folder, and as one file with the keys of the original SDXL code (DESIGN 4.4)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from backend import artifacts
from backend.errors import UsageError
from backend.training.model_card import model_card
from backend.training.models.bundle import Bundle

PREFIX = "model.diffusion_model."
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_diffusers(bundle: Bundle, folder: Path) -> Path:
    """Writes ``unet/`` as ``UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`` reads it, the injector, and the model card.

    The folder appears whole or not at all. Raises UsageError when it exists already.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already", hint="name a folder that does not")
    temporary = folder.with_name(f".{folder.name}{artifacts.TMP_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    bundle.model.unet.save_pretrained(temporary / "unet", safe_serialization=True)
    tokens = {"format": "pt", "style_tokens": bundle.model.injector.style_tokens}
    artifacts.save_tensors(temporary / "injector.safetensors", bundle.model.injector.state_dict(), tokens)
    artifacts.write_text(temporary / "README.md", model_card(bundle.header))
    temporary.rename(folder)
    artifacts.sync_folder(folder.parent)
    return folder


def write_single_file(bundle: Bundle, path: Path) -> str:
    """Writes the UNet as one safetensors file with the original SDXL keys (``model.diffusion_model.*``); returns its sha256."""
    tensors = bundle.model.unet.state_dict()
    names = original_names(tensors, int(bundle.model.unet.config.layers_per_block))
    header = {"format": "pt", "deephair_bundle": bundle.sha256, "note": "UNet alone: without the injector it follows no reference photo"}
    return artifacts.save_tensors(path, {names[name]: tensor for name, tensor in tensors.items()}, header)


def original_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """{name in diffusers: name in the original SDXL code} of a UNet with ``layers`` ResNets per down block.

    Raises ValueError for a name that no SDXL UNet has.
    """
    listed = list(names)
    attentive = {match[1] for name in listed if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return {name: PREFIX + _original(name, layers, attentive) for name in listed}


def _original(name: str, layers: int, attentive: set[str]) -> str:
    module, _, parameter = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{parameter}"
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match:
        side, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if side == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{level * (layers + 1) + number + 1}.{_part(kind, rest)}"
        block = level * (layers + 1) + (layers if kind == "upsamplers" else number)
        if kind == "upsamplers":  # after the ResNet and, where the level has attention, after that
            return f"output_blocks.{block}.{2 if match[2] in attentive else 1}.{rest}"
        return f"output_blocks.{block}.{_part(kind, rest)}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_part(match[1], match[3], alone=True)}"
    raise ValueError(f"'{name}' is no tensor of an SDXL UNet")


def _part(kind: str, rest: str, *, alone: bool = False) -> str:
    """The name inside a block: ResNets come first, attention second; in the middle block each is a block of its own."""
    if kind == "attentions":
        return rest if alone else f"1.{rest}"
    layer, _, parameter = rest.partition(".")
    return f"{_RESNET[layer]}.{parameter}" if alone else f"0.{_RESNET[layer]}.{parameter}"
