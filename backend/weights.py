"""The pretrained parts: what they are, where they lie below ``paths.weights``, their licence, and who needs them.

The miniature parts of the demo lie in exactly this layout, so nothing below knows which of the two it loads. No part is a pickle:
the formats are safetensors, ONNX and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backend import artifacts
from backend.config import Config
from backend.errors import MissingInputError, UsageError


@dataclass(frozen=True)
class Hub:
    """Where ``deephair models download`` fetches a part: a model repository of the Hugging Face hub or of a mirror of it.

    ``revision`` is a commit, or a branch where no commit is pinned. ``names`` gives the path in the repository of each file that has another
    name there. ``sha256`` holds the published digests; a file without one is held against the digest that the hub states for it.
    """

    repository: str
    revision: str
    names: Mapping[str, str] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One pretrained part.

    ``files`` are the files that must exist below ``folder``; ``extras`` are fetched with them and not asked for; ``verbs`` are the commands
    that load the part. ``hub`` is None where nothing can be fetched: then ``by_hand`` says how it is made. ``lpips_heads`` names the file
    that is written from the heads which the installed lpips package carries. ``gb`` is what a download moves, in 1e9 bytes, rounded.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    source: str
    licence: str
    verbs: tuple[str, ...]
    optional: bool = False
    hub: Hub | None = None
    extras: tuple[str, ...] = ()
    lpips_heads: str = ""
    by_hand: str = ""
    gb: float = 0.0


# uniface's mirror of its own releases. The digests are those that uniface publishes in its registry (a test compares them).
_UNIFACE = ("yakhyo/uniface-weights", "4c7ed723a20deb7ff154b1ba7d6e73747d954016")
_TOKENIZER_EXTRAS = ("special_tokens_map.json", "tokenizer_config.json")


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
        hub=Hub("diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "115134f363124c53c7d878647567d04daf26e41e"),
        extras=("model_index.json", *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in _TOKENIZER_EXTRAS)),
        gb=13.9,
    ),
    Part(
        "face_detector",
        "face",
        ("yolov8n-face.onnx",),
        "uniface YOLOv8-Face (nano)",
        "MIT code, GPL-3.0 weights",
        ("prepare", "serve", "tryon"),
        hub=Hub(
            *_UNIFACE,
            names={"yolov8n-face.onnx": "yolov8n_face.onnx"},
            sha256={"yolov8n-face.onnx": "33f3951af7fc0c4d9b321b29cdcd8c9a59d0a29a8d4bdc01fcb5507d5c714809"},
        ),
        gb=0.012,
    ),
    Part(
        "adaface",
        "face",
        ("adaface_ir_18.onnx",),
        "uniface AdaFace IR-18 (WebFace4M)",
        "MIT",
        ("prepare", "evaluate", "serve", "tryon"),
        hub=Hub(*_UNIFACE, sha256={"adaface_ir_18.onnx": "6b6a35772fb636cdd4fa86520c1a259d0c41472a76f70f802b351837a00d9870"}),
        gb=0.096,
    ),
    Part(
        "insightface",
        "face",
        ("w600k_r50.onnx",),
        "InsightFace buffalo_l",
        "research only",
        ("prepare", "evaluate", "serve", "tryon"),
        optional=True,
        hub=Hub(
            *_UNIFACE,
            names={"w600k_r50.onnx": "arcface_resnet.onnx"},
            sha256={"w600k_r50.onnx": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"},
        ),
        gb=0.174,
    ),
    Part(
        "face_parser",
        "face-parsing",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        "jonathandinu/face-parsing (SegFormer, CelebAMask-HQ)",
        "CelebAMask-HQ: non-commercial research",
        ("evaluate", "serve", "tryon"),
        hub=Hub("jonathandinu/face-parsing", "main"),
        gb=0.339,
    ),
    Part(
        "resnet",
        "resnet50",
        ("model.safetensors",),
        "timm/resnet50.tv_in1k (the torchvision ImageNet weights)",
        "BSD-3-Clause",
        ("texture",),
        hub=Hub(
            "timm/resnet50.tv_in1k",
            "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
            sha256={"model.safetensors": "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888"},
        ),
        gb=0.102,
    ),
    Part(
        "perceptual",
        "vgg16",
        ("model.safetensors", "lpips_heads.safetensors"),
        "timm/vgg16.tv_in1k and the linear heads of lpips v0.1",
        "BSD-3-Clause / BSD-2-Clause",
        ("train", "evaluate", "export"),
        hub=Hub(
            "timm/vgg16.tv_in1k",
            "b8d8aa2dd860af9233c8c67385a8097fd6c35d3f",
            sha256={"model.safetensors": "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8"},
        ),
        lpips_heads="lpips_heads.safetensors",
        gb=0.553,
    ),
    Part(
        "lpips_alex",
        "alexnet",
        ("model.safetensors", "lpips_heads.safetensors"),
        "torchvision's AlexNet (ImageNet) and the linear heads of lpips v0.1, converted: docs/evaluation.md",
        "BSD-3-Clause / BSD-2-Clause",
        ("evaluate", "export"),
        optional=True,
        by_hand="published as a pickle only; docs/evaluation.md says how to convert it",
    ),
    Part(
        "clip_image",
        "clip",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        "openai/clip-vit-base-patch32 (CLIP-I and FID_CLIP), as safetensors in sentence-transformers/clip-ViT-B-32",
        "MIT",
        ("evaluate", "export"),
        optional=True,
        hub=Hub(
            "sentence-transformers/clip-ViT-B-32",
            "327ab6726d33c0e22f920c83f2ff9e4bd38ca37f",
            names={name: f"0_CLIPModel/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")},
            sha256={"model.safetensors": "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d"},
        ),
        gb=0.605,
    ),
    Part(
        "dino",
        "dinov2",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        "facebook/dinov2-base",
        "Apache-2.0",
        ("evaluate", "export"),
        optional=True,
        hub=Hub("facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415"),
        gb=0.346,
    ),
    Part(
        "fid_inception",
        "fid",
        ("inception_v3.safetensors",),
        "torch-fidelity's weights-inception-2015-12-05, converted: docs/evaluation.md",
        "Apache-2.0",
        ("evaluate", "export"),
        optional=True,
        by_hand="published as a pickle only; docs/evaluation.md says how to convert it",
    ),
    Part(
        "controlnet",
        "controlnet",
        ("config.json", "diffusion_pytorch_model.safetensors"),
        "any SDXL ControlNet that reads the head-structure map",
        "as its source says",
        ("serve", "tryon"),
        optional=True,
        by_hand="train or choose one that reads the head-structure map; it is used where sample.controlnet_scale is above 0",
    ),
    Part(
        "lcm_lora",
        "lcm-lora",
        ("pytorch_lora_weights.safetensors",),
        "latent-consistency/lcm-lora-sdxl",
        "CreativeML Open RAIL++-M",
        ("serve", "tryon"),
        optional=True,
        hub=Hub("latent-consistency/lcm-lora-sdxl", "main"),
        gb=0.394,
    ),
    Part(
        "lightning_lora",
        "lightning-lora",
        ("sdxl_lightning_4step_lora.safetensors",),
        "ByteDance/SDXL-Lightning",
        "CreativeML Open RAIL++-M",
        ("serve", "tryon"),
        optional=True,
        hub=Hub("ByteDance/SDXL-Lightning", "main"),
        gb=0.394,
    ),
)

_BY_NAME = {part.name: part for part in PARTS}


def part(name: str) -> Part:
    """The part called ``name``; raises UsageError that names the known ones."""
    if name not in _BY_NAME:
        raise UsageError(f"there is no pretrained part '{name}'", hint=f"the parts are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def needed(config: Config) -> list[str]:
    """The parts without which ``deephair run`` and the app cannot do their work with this configuration, in the order of PARTS."""
    names = {part.name for part in PARTS if not part.optional} - {"adaface"} | {config.identity_model}
    if config.sample.controlnet_scale > 0:
        names.add("controlnet")
    if config.sample.few_step != "none":
        names.add(f"{config.sample.few_step}_lora")
    return [part.name for part in PARTS if part.name in names]


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
        cards = cards_of(weights, part)
        described[part.name] = f"{cards[0][0]} ({', '.join(dict.fromkeys(text for _, text in cards))})" if cards else part.source
    return described


def cards_of(weights: Path, part: Part) -> list[tuple[str, str]]:
    """(name, state) of every card that lies beside the part's files; only the miniature parts have them."""
    found: dict[Path, tuple[str, str]] = {}
    for file in (weights / part.folder / name for name in part.files):
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
            hint="'deephair models download' fetches them; or put the files there, or point paths.weights at the folder that has them; "
            "'make demo' runs without any of them",
        )
