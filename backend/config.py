"""Every setting of DeepHair: typed, validated, in one place (DESIGN section 3).

A configuration is read once from YAML plus ``key=value`` overrides and then passed explicitly. The defaults below are those of
``configs/rtx3060.yaml``. Relative paths in a YAML file are taken from the checkout, relative paths in an override from the current
folder, so that both mean what their writer sees.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from backend.errors import UsageError

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPO_ROOT / "configs" / "rtx3060.yaml"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


def _absolute(value: object) -> object:
    if isinstance(value, str | Path) and not Path(value).is_absolute():
        return REPO_ROOT / value
    return value


AnchoredPath = Annotated[Path, BeforeValidator(_absolute)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(Section):
    """Stage 0: where K-Hairstyle lies and how a photo becomes training data."""

    images: AnchoredPath = Path("backend/data/dataset/khairstyle/training/images")
    labels: AnchoredPath = Path("backend/data/dataset/khairstyle/training/labels")
    resolution: Annotated[int, Field(ge=64, le=2048, multiple_of=8)] = 1024  # side of the square head crop, px
    patch_size: Annotated[int, Field(ge=16, le=512)] = 128  # side of the written hair patches, px
    patches_per_photo: Positive = 12
    patch_min_hair: Fraction = 0.85
    bald: Literal["telea", "ns", "two_part"] = "two_part"
    max_pixels: Positive = 50_000_000  # photos larger than this are quarantined
    min_hair_fraction: Fraction = 0.005  # of the head crop; less is quarantined as no_hair
    split: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)  # train, val, test
    workers: Annotated[int, Field(ge=0, le=64)] = 0  # 0: one per core, 8 at most
    scheduler: str = ""  # address of a dask scheduler, tcp://host:8786, whose workers do the photos; empty: processes of this machine
    limit: Annotated[int, Field(ge=0)] = 0  # 0: all photos
    seed: int = 0

    @model_validator(mode="after")
    def _split_sums_to_one(self) -> Self:
        if abs(sum(self.split) - 1.0) > 1e-6:
            raise ValueError(f"data.split must sum to 1, got {self.split} = {sum(self.split):g}")
        if self.patch_size > self.resolution:
            raise ValueError(f"data.patch_size {self.patch_size} is larger than data.resolution {self.resolution}")
        return self


class PathsConfig(Section):
    """Where things are read and written."""

    processed: AnchoredPath = Path("backend/training/processed")
    checkpoints: AnchoredPath = Path("backend/training/checkpoints")
    models: AnchoredPath = Path("backend/training/models")  # the deployed bundle: {models}/deep_hair_v1.safetensors
    report: AnchoredPath = Path("backend/training/report")
    weights: AnchoredPath = Path("backend/models")  # pretrained parts, laid out as backend/weights.py says
    jobs: AnchoredPath = Path("backend/app/jobs")  # uploads and results of the app, deleted after app.ttl_s

    @property
    def bundle(self) -> Path:
        """The deployed model."""
        return self.models / "deep_hair_v1.safetensors"


class TextureConfig(Section):
    """Stage 1 (DESIGN 4.2)."""

    layers: tuple[Positive, Positive, Positive, Positive] = (3, 4, 6, 3)  # bottlenecks per block; this is ResNet50
    image_size: Annotated[int, Field(ge=32, le=512)] = 128  # side at which patches enter the network, px
    steps: Positive = 20_000
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Annotated[float, Field(gt=0)] = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    supcon_weight: Annotated[float, Field(ge=0)] = 0.5
    colour_weight: Annotated[float, Field(ge=0)] = 1.0  # of the loss that keeps colour in the features; it is no label
    temperature: Annotated[float, Field(gt=0)] = 0.1
    painted: Annotated[int, Field(ge=0)] = 0  # training photos whose hair is also seen as the base model's autoencoder gives it back
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of an average of the weights, which is then what is judged and kept; 0: none
    save_every: Positive = 500  # steps between checkpoints, and between looks at the validation split
    keep: Positive = 3
    patience: Annotated[int, Field(ge=0)] = (
        10  # validations without a better balanced accuracy before stopping; 0: last weights, no early stop
    )
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16 on cards and CPUs that have instructions for it, else fp32
    workers: Annotated[int, Field(ge=0)] = 4
    seed: int = 0


class DropConfig(Section):
    """Probabilities of replacing a condition by its null value in training, drawn independently; ``all`` drops the three together."""

    text: Fraction = 0.10
    style: Fraction = 0.10
    identity: Fraction = 0.10
    all: Fraction = 0.05


class TrainConfig(Section):
    """Stage 2 (DESIGN 4.3)."""

    # backend/training/presets.py, docs/training.md
    preset: Literal["full-12gb", "full-8gb", "partial", "lora", "full-exact", "full-80gb"] = "full-12gb"
    start: AnchoredPath | None = None  # a Stage 2 checkpoint to go on from instead of the base model alone
    steps: Positive = 100_000
    batch_size: Positive = 2  # samples in memory at a time, per process
    accumulate: Positive = 1  # such batches per step; not in full-12gb and full-8gb, which step inside the backward pass
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 16  # of preset lora
    lr: Annotated[float, Field(gt=0)] = 2e-6
    injector_lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    # full-12gb and full-8gb: the root mean square of each tensor's update is bounded by 1, or the global gradient norm by clip_norm as it
    # was one step before; the other presets clip the global norm, exactly
    clipping: Literal["update-rms", "previous-norm"] = "update-rms"
    style_tokens: Literal[1, 16] = 1
    # style and identity tokens among the text's, or with keys and values of their own behind a gate that begins at zero (IP-Adapter)
    injection: Literal["appended", "decoupled"] = "appended"
    reference: Literal["other", "same"] = "other"  # style reference: another photo of the head where there is one, or the photo itself
    drop: DropConfig = DropConfig()
    mask_variants: Annotated[int, Field(ge=1, le=16)] = 4  # random edit regions cached per photo
    outside_weight: Annotated[float, Field(ge=0)] = 0.1  # of MaskAwareLoss outside the edit region
    texture_every: Annotated[int, Field(ge=0)] = 50  # 0: never
    texture_weight: Annotated[float, Field(ge=0)] = 0.3  # of a loss that is 0 for equal textures and 1 at most; docs/method.md
    texture_max_timestep: Annotated[int, Field(ge=1, le=1000)] = 300
    texture_crop: Annotated[int, Field(ge=4, multiple_of=2)] = 32  # side of the decoded latent crop
    min_snr_gamma: Annotated[float, Field(ge=0)] = 0.0  # 0: off
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    gradient_checkpointing: bool = True
    compile: bool = False  # torch.compile of the UNet's repeated blocks: a minute at the start, faster steps afterwards
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay per step of the weights' moving average, kept on the CPU and deployed; 0: off
    ema_every: Positive = 10  # steps between its updates
    prefetch: Annotated[int, Field(ge=0, le=16)] = 1  # threads that draw coming batches; 0: none
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.95  # of the card's free memory at the start that the process may take
    save_every: Positive = 500
    keep: Positive = 2  # step checkpoints kept; the newest is never removed
    validate_every: Positive = 500
    validation_samples: Positive = 64
    preview_every: Annotated[int, Field(ge=0)] = 500  # sample pictures; 0: never
    log_every: Positive = 10
    seed: int = 0


class EvaluateConfig(Section):
    """Stage 3, measuring."""

    protocol: Literal["standard", "hairfusion"] = "standard"  # hairfusion: K-Hairstyle as in that paper; it sets samples and size itself
    pairs: AnchoredPath | None = None  # stored pairs (a report's pairs.json) instead of drawn ones
    networks: tuple[Literal["lpips_alex", "clip_image", "dino", "fid_inception"], ...] = (
        "lpips_alex",
        "clip_image",
        "dino",
        "fid_inception",
    )
    workers: Annotated[int, Field(ge=0, le=64)] = 0  # threads that read and measure; 0: one per core, 8 at most
    split: Literal["val", "test"] = "test"
    samples: Positive = 200  # pairs of the transfer protocol
    samples_reconstruction: Positive = 200
    batch_size: Positive = 2  # pairs; guidance doubles them
    steps: Positive = 30  # sampling steps
    guidance: Annotated[float, Field(ge=1)] = 2.0
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    pictures: Annotated[int, Field(ge=1, le=200)] = 12  # rows of the report's grid
    seed: int = 0


class GateConfig(Section):
    """Stage 3, deciding. Both profiles are computed, ``profile`` decides."""

    profile: Literal["design", "evidence"] = "design"
    lpips_max: Annotated[float, Field(gt=0)] = 0.20
    psnr_min: Annotated[float, Field(gt=0)] = 25.0
    failure_max: Fraction = 0.10  # share of results in which no face is found, or that are no picture
    ceiling_share: Fraction = 0.25  # least part of the way from the bald image to the VAE's own reconstruction, in LPIPS and in PSNR
    worse_lpips: Annotated[float, Field(ge=0)] = 0.01  # how much worse than the deployed model is let pass
    worse_psnr: Annotated[float, Field(ge=0)] = 0.3  # dB
    worse_color: Annotated[float, Field(ge=0)] = 0.5  # CIEDE2000
    force: str = ""  # a reason: deploy even where the gate fails, and write the reason into the header and the report


class SampleConfig(Section):
    """Sampling when serving; evaluation uses its own number of steps and guidance."""

    steps: Annotated[int, Field(ge=1, le=200)] = 30
    guidance: Annotated[float, Field(ge=1, le=20)] = 2.0
    feather: Annotated[float, Field(ge=0, le=0.2)] = 0.02  # width of the soft edge, share of the crop's side
    controlnet_scale: Annotated[float, Field(ge=0, le=2)] = 0.0  # 0: the ControlNet is not loaded
    # a distilled LoRA of paths.weights, with its own sampler: few_steps and guidance 1 instead of steps and guidance; docs/serving.md
    few_step: Literal["none", "lcm", "lightning"] = "none"
    few_steps: Annotated[int, Field(ge=1, le=8)] = 4  # lightning's file is of four
    offload: bool = False  # each network is on the card only while it computes: slower, for cards of 8 GB
    compile: bool = False  # torch.compile of the UNet when the server starts: minutes there, faster steps afterwards

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.few_step == "lightning" and self.few_steps != 4:
            raise ValueError(f"sample.few_steps is {self.few_steps}; the LoRA of sample.few_step lightning is the one of 4 steps")
        if self.offload and self.compile:
            raise ValueError("sample.offload and sample.compile exclude each other: set one of the two")
        return self


class AppConfig(Section):
    """The web application."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    # sqlite: one server on this machine; redis://, rediss:// or unix://: several, on several machines. It may hold a password: never written
    queue: Annotated[str, Field(pattern=r"^(sqlite|rediss?://.+|unix://.+)$", exclude=True)] = "sqlite"
    queue_size: Positive = 16
    max_upload_mb: Positive = 20
    max_megapixels: Annotated[float, Field(gt=0)] = 25.0
    ttl_s: Positive = 3600  # photos and results are deleted this long after a job has ended
    smooth_face: bool = True
    gallery: AnchoredPath = Path("backend/app/static/gallery")  # reference pictures that the page offers
    cors_origin: str = ""  # one explicit origin, or none
    allowed_hosts: tuple[str, ...] = ()  # further names that the server answers to, beside host and localhost
    api_key: str = Field(default="", exclude=True)  # never written into a report or a checkpoint's header


class Config(Section):
    """The whole configuration. ``device`` and ``dtype`` say where networks run: ``auto`` is CUDA with bf16 where there is a card."""

    name: str = "rtx3060"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = DataConfig()
    paths: PathsConfig = PathsConfig()
    texture: TextureConfig = TextureConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    sample: SampleConfig = SampleConfig()
    app: AppConfig = AppConfig()
    identity_model: Literal["adaface", "insightface"] = "adaface"

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        latent = self.data.resolution // 8
        if self.train.texture_every and self.train.texture_crop > latent:
            raise ValueError(
                f"train.texture_crop {self.train.texture_crop} is larger than the latent ({latent} at data.resolution "
                f"{self.data.resolution}); set it to {latent} or less, or train.texture_every=0"
            )
        if self.train.accumulate > 1 and self.train.preset in ("full-12gb", "full-8gb"):
            raise ValueError(
                f"train.accumulate {self.train.accumulate} is not possible with train.preset {self.train.preset}, which steps inside the "
                f"backward pass; raise train.batch_size, which is the true batch there, or take preset partial, lora or full-80gb"
            )
        if self.train.compile and self.train.preset == "full-exact":
            raise ValueError(
                "train.compile is not possible with train.preset full-exact, whose layers borrow their weights; set one of the two"
            )
        if self.train.warmup >= self.train.steps:
            raise ValueError(f"train.warmup {self.train.warmup} must be below train.steps {self.train.steps}")
        if self.texture.warmup >= self.texture.steps:
            raise ValueError(f"texture.warmup {self.texture.warmup} must be below texture.steps {self.texture.steps}")
        return self

    def resolved(self) -> dict[str, Any]:
        """The configuration as plain JSON values, written into every output folder and checkpoint header."""
        return self.model_dump(mode="json")

    def digest(self, *sections: str) -> str:
        """sha256 of the named sections (all when none is named); paths are left out, since moving a folder changes nothing."""
        plain = {key: value for key, value in self.resolved().items() if key != "paths" and (not sections or key in sections)}
        if "data" in plain:
            plain["data"] = {k: v for k, v in plain["data"].items() if k not in ("images", "labels", "workers", "scheduler")}
        if "evaluate" in plain:
            plain["evaluate"] = {k: v for k, v in plain["evaluate"].items() if k != "workers"}
        if "train" in plain:
            plain["train"] = {
                k: v for k, v in plain["train"].items() if k not in ("start", "prefetch", "memory_fraction")
            }  # of start the content counts, not its place
        if "texture" in plain:
            plain["texture"] = {k: v for k, v in plain["texture"].items() if k not in ("keep", "workers")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys, for example ``train.lr``."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def load_config(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Reads ``path`` (the default configuration when None) and applies ``key=value`` overrides, the last one winning.

    Raises UsageError for a missing file, an unknown key (with the nearest known one) and every invalid value.
    """
    file = Path(path) if path is not None else DEFAULT_CONFIG
    values = _read_yaml(file)
    _refuse_unknown(_flatten(values), source=str(file))
    for override in overrides:
        key, value = _parse_override(override)
        _set(values, key.split("."), value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']} (got {_short(e['input'])})" for e in error.errors()]
        raise UsageError(
            "the configuration is not valid:\n  " + "\n  ".join(lines), hint=f"settings come from {file} and overrides"
        ) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no configuration file at {file}", hint="shipped ones: configs/demo.yaml, rtx3060.yaml, h100.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read as YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold a mapping of settings, got {type(values).__name__}")
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, raw = text.partition("=")
    if not separator:
        raise UsageError(f"'{text}' is not an override", hint="write key=value, for example train.lr=1e-6")
    _refuse_unknown([key], source="override")
    try:
        value = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError as error:
        raise UsageError(f"the value of '{text}' cannot be read: {error}") from error
    # YAML reads 1e-6 (no dot) as a string; pydantic turns it into a number where one is wanted.
    if key in _path_keys() and isinstance(value, str):
        value = str(Path(value).absolute())
    return key, value


def _path_keys() -> set[str]:
    return {f"paths.{name}" for name in PathsConfig.model_fields} | {
        "data.images",
        "data.labels",
        "train.start",
        "evaluate.pairs",
        "app.gallery",
    }


def _refuse_unknown(keys: Iterable[str], *, source: str) -> None:
    known = known_keys()
    sections = {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    for key in keys:
        if key in known or key in sections:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or difflib.get_close_matches(
            key.rsplit(".")[-1], known, n=1, cutoff=0.4
        )
        hint = f"did you mean '{near[0]}'?" if near else "see configs/rtx3060.yaml for all settings"
        raise UsageError(f"unknown setting '{key}' ({source})", hint=hint)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in values.items():
        keys += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return keys


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        nested = values.setdefault(name, {})
        values = nested if isinstance(nested, dict) else {}
    values[path[-1]] = value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
