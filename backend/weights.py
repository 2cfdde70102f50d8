"""The pretrained parts: what they are, where they lie below ``paths.weights``, their licence, and who needs them.

The miniature parts of the demo lie in exactly this layout, so nothing below knows which of the two it loads. No part is a pickle:
the formats are safetensors, ONNX and JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backend import artifacts
from backend.errors import MissingInputError


@dataclass(frozen=True)
class Part:
    """One pretrained part. ``files`` are the files that must exist below ``folder``; ``verbs`` are the commands that load it."""

    name: str
    folder: str
    files: tuple[str, ...]
    source: str
    licence: str
    verbs: tuple[str, ...]
    optional: bool = False


PARTS: tuple[Part, ...] = (
    Part(
        "inpainting",
        "stable-diffusion/sd_xl_inpainting",
        (
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder_2/config.json",
            "text_encoder_2/model.safetensors",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "tokenizer_2/vocab.json",
            "tokenizer_2/merges.txt",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ),
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        "CreativeML Open RAIL++-M",
        ("train", "evaluate", "export", "serve", "tryon"),
    ),
    Part(
        "face_detector",
        "face",
        ("yolov8n-face.onnx",),
        "uniface YOLOv8-Face (nano)",
        "MIT code, GPL-3.0 weights",
        ("prepare", "serve", "tryon"),
    ),
    Part("adaface", "face", ("adaface_ir_18.onnx",), "uniface AdaFace IR-18 (WebFace4M)", "MIT", ("prepare", "evaluate", "serve", "tryon")),
    Part(
        "insightface",
        "face",
        ("w600k_r50.onnx",),
        "InsightFace buffalo_l",
        "research only",
        ("prepare", "evaluate", "serve", "tryon"),
        optional=True,
    ),
    Part(
        "face_parser",
        "face-parsing",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        "jonathandinu/face-parsing (SegFormer, CelebAMask-HQ)",
        "CelebAMask-HQ: non-commercial research",
        ("evaluate", "serve", "tryon"),
    ),
    Part(
        "resnet",
        "resnet50",
        ("model.safetensors",),
        "timm/resnet50.tv_in1k (the torchvision ImageNet weights)",
        "BSD-3-Clause",
        ("texture",),
    ),
    Part(
        "perceptual",
        "vgg16",
        ("model.safetensors", "lpips_heads.safetensors"),
        "timm/vgg16.tv_in1k and the linear heads of lpips v0.1",
        "BSD-3-Clause / BSD-2-Clause",
        ("train", "evaluate", "export"),
    ),
    Part(
        "lpips_alex",
        "alexnet",
        ("model.safetensors", "lpips_heads.safetensors"),
        "torchvision's AlexNet (ImageNet) and the linear heads of lpips v0.1, converted: docs/evaluation.md",
        "BSD-3-Clause / BSD-2-Clause",
        ("evaluate", "export"),
        optional=True,
    ),
    Part(
        "clip_image",
        "clip",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        "openai/clip-vit-base-patch32 (CLIP-I and FID_CLIP)",
        "MIT",
        ("evaluate", "export"),
        optional=True,
    ),
    Part(
        "dino",
        "dinov2",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        "facebook/dinov2-base",
        "Apache-2.0",
        ("evaluate", "export"),
        optional=True,
    ),
    Part(
        "fid_inception",
        "fid",
        ("inception_v3.safetensors",),
        "torch-fidelity's weights-inception-2015-12-05, converted: docs/evaluation.md",
        "Apache-2.0",
        ("evaluate", "export"),
        optional=True,
    ),
    Part(
        "controlnet",
        "controlnet",
        ("config.json", "diffusion_pytorch_model.safetensors"),
        "any SDXL ControlNet that reads the head-structure map",
        "as its source says",
        ("serve", "tryon"),
        optional=True,
    ),
)

_BY_NAME = {part.name: part for part in PARTS}


def folder(weights: Path, name: str) -> Path:
    """The folder of a part below ``paths.weights``."""
    return weights / _BY_NAME[name].folder


def files(weights: Path, name: str) -> list[Path]:
    """The files of a part below ``paths.weights``, whether they exist or not."""
    part = _BY_NAME[name]
    return [weights / part.folder / file for file in part.files]


def describe(weights: Path) -> dict[str, str]:
    """What each present part is, for reports: what its cards say where it has any (the miniature's do), else its published source."""
    described = {}
    for part in PARTS:
        if missing_files(weights, part.name):
            continue
        cards = _cards(weights / part.folder, part)
        described[part.name] = f"{cards[0][0]} ({', '.join(dict.fromkeys(text for _, text in cards))})" if cards else part.source
    return described


def _cards(folder: Path, part: Part) -> list[tuple[str, str]]:
    """(name, state) of every card that lies beside the part's files."""
    found: dict[Path, tuple[str, str]] = {}
    for file in (folder / name for name in part.files):
        for path in (file.with_name(f"{file.stem}.card.json"), file.with_name("card.json")):
            if path.is_file() and path not in found:
                card = artifacts.read_json(path)
                state = f"trained, {card.get('steps')} steps" if card.get("trained") else "untrained"
                kind = f"{file.parent.name}: " if len(part.files) > 3 else ""
                found[path] = (str(card.get("name", part.name)), kind + state if "trained" in card else part.source)
                break
    return list(found.values())


def is_miniature(weights: Path) -> bool:
    """Whether any present part is a miniature one; then figures speak of code and method, not of photographs."""
    return any(text.startswith("miniature") for text in describe(weights).values())


def listing(weights: Path) -> list[dict[str, str]]:
    """One row per part for ``deephair models list``: name, state (found, partly, missing, optional), folder, source, licence."""
    rows = []
    for part in PARTS:
        absent = len(missing_files(weights, part.name))
        state = "found" if not absent else "partly" if absent < len(part.files) else "optional" if part.optional else "missing"
        rows.append(
            {"name": part.name, "state": state, "folder": str(weights / part.folder), "source": part.source, "licence": part.licence}
        )
    return rows


def missing_files(weights: Path, name: str) -> list[Path]:
    """The files of a part that are not there."""
    return [path for path in files(weights, name) if not path.is_file()]


def require(weights: Path, *names: str) -> None:
    """Raises one MissingInputError that names everything of the parts ``names`` that is missing, where it belongs and its source."""
    lines = []
    for name in names:
        absent = missing_files(weights, name)
        if absent:
            part = _BY_NAME[name]
            shown = ", ".join(str(path.relative_to(weights / part.folder)) for path in absent[:4]) + (" ..." if len(absent) > 4 else "")
            lines.append(f"{name}: {shown} missing in {weights / part.folder}{'/'}  (source: {part.source}; licence: {part.licence})")
    if lines:
        raise MissingInputError(
            "pretrained weights are missing:\n  " + "\n  ".join(lines),
            hint="put the files there, or point paths.weights at the folder that has them; 'make demo' runs without any of them",
        )
