"""The miniature weights folder: every pretrained part in its real format and at a size that a CPU runs (DESIGN section 6).

``build`` takes the trained part where ``backend/demo/weights`` has it and creates it from a seed, untrained, where not. Each part has
a card (``card.json``, or ``NAME.card.json`` beside a single file) that says which of the two it is and, where trained, how well it does.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import artifacts

if TYPE_CHECKING:
    from torch import nn

TRAINED = Path(__file__).resolve().parent / "weights"
_SDXL = "stable-diffusion/sd_xl_inpainting"


@dataclass(frozen=True)
class MiniaturePart:
    """What is made, trained and copied together: ``paths`` (files or folders) and ``card`` are relative to the weights folder.

    ``large``: a file below ``paths`` that the repository holds in 8 bits (``backend.demo.compact``); empty for none.
    """

    name: str
    paths: tuple[str, ...]
    card: str
    create: Callable[[Path], None]
    large: str = ""


def build(out: Path, *, seed: int = 0, trained: Path = TRAINED) -> dict[str, dict[str, Any]]:
    """Writes a complete weights folder in the layout of ``backend.weights.PARTS``; returns each part's card by name.

    Equal ``seed`` and ``trained`` give byte-equal files. Other files that are already in ``out`` are left alone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    cards = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        for part in PARTS:
            cards[part.name] = _place(part, Path(temporary), trained, seed)
        for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            target = out / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    return cards


def create(name: str, folder: Path, *, seed: int = 0) -> None:
    """Writes one untrained part, drawn from ``seed``, below the weights folder ``folder``."""
    import torch

    from backend.training import keyed

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.key(seed, f"miniature-{name}"))
        by_name(name).create(folder)


def by_name(name: str) -> MiniaturePart:
    """The miniature part of that name; raises KeyError."""
    return {part.name: part for part in PARTS}[name]


def _place(part: MiniaturePart, folder: Path, trained: Path, seed: int) -> dict[str, Any]:
    if (trained / part.card).is_file():
        copy_part(part, trained, folder)
        return dict(artifacts.read_json(trained / part.card))
    create(part.name, folder, seed=seed)
    card: dict[str, Any] = {"part": part.name, "name": "miniature", "trained": False, "seed": seed, "steps": 0, "scores": {}}
    artifacts.write_json(folder / part.card, card)
    return card


def copy_part(part: MiniaturePart, source: Path, target: Path) -> None:
    """Copies a part's files, and its card where there is one, from one weights folder to another; 8-bit files are expanded."""
    from backend.demo import compact

    for path in (*part.paths, part.card):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if (source / path).is_dir():
            shutil.copytree(source / path, target / path, dirs_exist_ok=True)
        elif (source / path).is_file():
            shutil.copyfile(source / path, target / path)
    if part.large:
        compact.expand(source / part.large, target / part.large)


def load_part(name: str, source: Path, model: nn.Module) -> None:
    """Puts the weights of a trained diffusers part in the weights folder ``source`` into a model of its kind."""
    part = by_name(name)
    with tempfile.TemporaryDirectory() as temporary:
        copy_part(part, source, Path(temporary))
        model.load_state_dict({key: tensor.float() for key, tensor in artifacts.load_tensors(Path(temporary) / part.large).items()})


# ---- the parts -----------------------------------------------------------------


def write_detector(folder: Path, net: nn.Module) -> None:
    """A FaceDetectorNet as ``yolov8n-face.onnx``."""
    from backend.demo.networks import DETECTOR_CHANNELS, DETECTOR_SIDE, DETECTOR_STRIDES
    from backend.demo.onnx_graph import to_onnx

    outputs = [(f"output{k}", (1, DETECTOR_CHANNELS, *[DETECTOR_SIDE // stride] * 2)) for k, stride in enumerate(DETECTOR_STRIDES)]
    artifacts.write_bytes(folder / "face/yolov8n-face.onnx", to_onnx(net, (1, 3, DETECTOR_SIDE, DETECTOR_SIDE), outputs))


def write_identity(folder: Path, net: nn.Module) -> None:
    """An IdentityNet as ``adaface_ir_18.onnx``."""
    from backend.demo.networks import IDENTITY_SIDE, IDENTITY_WIDTH
    from backend.demo.onnx_graph import to_onnx

    content = to_onnx(net, ("batch", 3, IDENTITY_SIDE, IDENTITY_SIDE), [("embedding", ("batch", IDENTITY_WIDTH))])
    artifacts.write_bytes(folder / "face/adaface_ir_18.onnx", content)


def write_parser(folder: Path, model: Any) -> None:
    """A SegFormer in half precision with its image processor: 192x192, ImageNet's mean and standard deviation."""
    from transformers import SegformerImageProcessor

    from backend.demo.architectures import PARSER_SIDE

    _save(copy.deepcopy(model).half(), folder / "face-parsing")
    SegformerImageProcessor(size={"height": PARSER_SIDE, "width": PARSER_SIDE}, do_reduce_labels=False).save_pretrained(
        folder / "face-parsing"
    )


def write_perceptual(folder: Path, features: nn.Sequential) -> None:
    """VGG-shaped features and uniform LPIPS heads."""
    from backend.demo.networks import lpips_heads

    metadata = {"format": "pt"}
    artifacts.save_tensors(
        folder / "vgg16/model.safetensors", {f"features.{k}": v.half() for k, v in features.state_dict().items()}, metadata
    )
    artifacts.save_tensors(folder / "vgg16/lpips_heads.safetensors", lpips_heads(), metadata)


def write_diffusion(folder: Path, name: str, model: Any) -> None:
    """A diffusers model (``vae``, ``unet``, ``controlnet``) in half precision, which loads as float32."""
    _save(copy.deepcopy(model).half(), folder / "controlnet" if name == "controlnet" else folder / _SDXL / name)


def write_text_encoders(folder: Path, first: Any, second: Any) -> None:
    """SDXL's two text encoders in half precision."""
    _save(copy.deepcopy(first).half(), folder / _SDXL / "text_encoder")
    _save(copy.deepcopy(second).half(), folder / _SDXL / "text_encoder_2")


def _save(model: Any, folder: Path) -> None:
    """``save_pretrained`` without its progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def write_tokenizers(folder: Path) -> int:
    """SDXL's two tokenizers over the words of our prompts; returns the size of the vocabulary."""
    from backend.demo.vocabulary import END, write_tokenizer
    from backend.training.data_processing.prompts import all_prompt_words

    words = all_prompt_words()
    write_tokenizer(folder / _SDXL / "tokenizer", words, pad=END)
    return write_tokenizer(folder / _SDXL / "tokenizer_2", words, pad="!")


def _create_detector(folder: Path) -> None:
    from backend.demo.networks import FaceDetectorNet

    write_detector(folder, FaceDetectorNet())


def _create_identity(folder: Path) -> None:
    from backend.demo.networks import IdentityNet

    write_identity(folder, IdentityNet())


def _create_parser(folder: Path) -> None:
    from backend.demo import architectures

    write_parser(folder, architectures.parser())


def _create_perceptual(folder: Path) -> None:
    from backend.demo.networks import vgg_features

    write_perceptual(folder, vgg_features())


def _create_resnet(folder: Path) -> None:
    from backend.demo.networks import resnet

    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in resnet().items()}
    write_resnet(folder, tensors)


def write_resnet(folder: Path, tensors: dict[str, Any]) -> None:
    """A ResNet's tensors in torchvision's names."""
    artifacts.save_tensors(folder / "resnet50/model.safetensors", tensors, {"format": "pt"})


def _create_text(folder: Path) -> None:
    from backend.demo import architectures

    write_text_encoders(folder, *architectures.text_encoders(write_tokenizers(folder)))


def _create_vae(folder: Path) -> None:
    from backend.demo import architectures

    write_diffusion(folder, "vae", architectures.vae())


def _create_unet(folder: Path) -> None:
    """The UNet with its scheduler and the index that lets diffusers' pipelines load the folder."""
    from backend.demo import architectures

    write_diffusion(folder, "unet", architectures.unet())
    architectures.scheduler().save_pretrained(folder / _SDXL / "scheduler")
    write_pipeline_index(folder)


def write_pipeline_index(folder: Path) -> None:
    """``model_index.json``, which names the class of every component of StableDiffusionXLInpaintPipeline."""
    classes = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    artifacts.write_json(
        folder / _SDXL / "model_index.json",
        {"_class_name": "StableDiffusionXLInpaintPipeline", "force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False}
        | classes,
    )


def _create_controlnet(folder: Path) -> None:
    from backend.demo import architectures

    write_diffusion(folder, "controlnet", architectures.controlnet())


def _create_stage2(folder: Path) -> None:
    """A Stage 2 checkpoint of random weights."""
    from backend.demo import architectures
    from backend.training.models.stage2_unet import HairInpaintingUNet

    write_stage2(folder, HairInpaintingUNet(architectures.unet(), architectures.STYLE_TOKENS).state_dict())


def write_stage2(folder: Path, tensors: Any) -> None:
    """The weights of a Stage 2 checkpoint in half precision."""
    artifacts.save_tensors(folder / STAGE2_START, {name: tensor.half() for name, tensor in tensors.items()}, {"format": "pt"})


STAGE2_START = "deephair/stage2_start.safetensors"
PARTS: tuple[MiniaturePart, ...] = (
    MiniaturePart("detector", ("face/yolov8n-face.onnx",), "face/yolov8n-face.card.json", _create_detector),
    MiniaturePart("parser", ("face-parsing",), "face-parsing/card.json", _create_parser),
    MiniaturePart("identity", ("face/adaface_ir_18.onnx",), "face/adaface_ir_18.card.json", _create_identity),
    MiniaturePart("perceptual", ("vgg16",), "vgg16/card.json", _create_perceptual),
    MiniaturePart("resnet", ("resnet50",), "resnet50/card.json", _create_resnet, "resnet50/model.safetensors"),
    MiniaturePart(
        "text",
        tuple(f"{_SDXL}/{name}" for name in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")),
        f"{_SDXL}/text_encoder/card.json",
        _create_text,
    ),
    MiniaturePart("vae", (f"{_SDXL}/vae",), f"{_SDXL}/vae/card.json", _create_vae, f"{_SDXL}/vae/diffusion_pytorch_model.safetensors"),
    MiniaturePart(
        "unet",
        (f"{_SDXL}/unet", f"{_SDXL}/scheduler", f"{_SDXL}/model_index.json"),
        f"{_SDXL}/unet/card.json",
        _create_unet,
        f"{_SDXL}/unet/diffusion_pytorch_model.safetensors",
    ),
    MiniaturePart(
        "controlnet", ("controlnet",), "controlnet/card.json", _create_controlnet, "controlnet/diffusion_pytorch_model.safetensors"
    ),
    MiniaturePart("stage2", (STAGE2_START,), "deephair/card.json", _create_stage2, STAGE2_START),
)
