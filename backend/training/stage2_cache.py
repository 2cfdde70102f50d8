"""Latents, prompts and style features computed once, so that no encoder sits in memory while the UNet trains (DESIGN 4.3).

``processed/latents/{split}_{key}/`` holds shards of samples in the order of their ids; the key covers everything they depend on. A
prompt's embedding is one file per distinct prompt, ``processed/prompt_embeddings/{sha}.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend import artifacts, console
from backend.config import Config
from backend.errors import MissingInputError
from backend.imaging import crop, masks
from backend.imaging.decode import read_png
from backend.machine import cores
from backend.training.keyed import numpy_generator
from backend.training.models.texture_encoder import TextureEncoder
from backend.training.prefetch import ahead
from backend.training.prepared import Prepared, Sample
from backend.tryon import conditioning

logger = logging.getLogger(__name__)

SHARD = 256  # samples per file
POOL = 128  # silhouettes that a split's edit regions borrow from
POOL_SIDE = 128  # their side, px
REGIONS = 5  # raise when edit regions are made otherwise: cached latents of the older kind are then not used
BATCH = 8  # pictures per pass of the VAE, at most
BATCH_PIXELS = 2 * 1024 * 1024  # in such a pass: encoding takes 1.25 GiB for each 1024 x 1024 of them (training_memory.md, section 0)
RESIDENT = 2 << 30  # bytes of latents that are kept in memory; beyond it they are read from mapped files


@dataclass(frozen=True)
class CacheKey:
    """Digests of what cached values depend on."""

    data: str
    vae: str
    texts: str
    texture: str

    @classmethod
    def of(cls, config: Config, prepared: Prepared, texture_encoder: Path) -> CacheKey:
        """Hashes the data, the VAE, the text encoders and the Stage 1 encoder."""
        base = conditioning.inpainting_folder(config.paths.weights)
        names = ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt")
        return cls(
            data=prepared.digest,
            vae=artifacts.sha256_file(base / "vae/diffusion_pytorch_model.safetensors"),
            texts="/".join(artifacts.sha256_file(base / name) for name in names),
            texture=artifacts.sha256_file(texture_encoder),
        )

    def latents(self, config: Config) -> str:
        """Short digest for the folder of latents."""
        train = config.train
        parts = [self.data, self.vae, self.texture, config.data.bald, train.mask_variants, train.style_tokens, train.seed, SHARD, REGIONS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class LatentCache:
    """Cached samples of one split, read from memory-mapped shards."""

    def __init__(self, folder: Path, ids: list[str]) -> None:
        from safetensors import safe_open

        self.ids = ids
        paths = [_shard(folder, n) for n in range(-(-len(ids) // SHARD))]
        self._shards = [safe_open(path, framework="pt") for path in paths]
        self._resident = sum(path.stat().st_size for path in paths) <= RESIDENT
        self._columns: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, name: str, index: int) -> torch.Tensor:
        """One sample's tensor: photo_mean, photo_std (4, h, w); bald (V, 4, h, w); mask (V, 1, h, w); excluded (1, h, w);
        style (S, 2048); identity (512,); identity_valid (1,)."""
        if self._resident:
            return self._column(name)[index]
        value: torch.Tensor = self._shards[index // SHARD].get_slice(name)[index % SHARD]
        return value

    def take(self, name: str, indices: NDArray[np.int64]) -> torch.Tensor:
        """The tensors of several samples, stacked: (len(indices), ...)."""
        if self._resident:
            return self._column(name)[torch.from_numpy(indices)]
        return torch.stack([self.get(name, int(index)) for index in indices])

    def _column(self, name: str) -> torch.Tensor:
        if name not in self._columns:
            self._columns[name] = torch.cat([shard.get_tensor(name) for shard in self._shards])
        return self._columns[name]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def build_latents(config: Config, prepared: Prepared, split: str, key: CacheKey, vae: Any, encoder: TextureEncoder) -> LatentCache:
    """Encodes what is missing of a split's latents and opens them. A killed build goes on at the shard it was at."""
    rows = prepared.rows(split)
    if not rows:
        raise MissingInputError(f"the {split} split has no photo", hint="prepare more photos, or change data.split")
    folder = config.paths.processed / "latents" / f"{split}_{key.latents(config)}"
    ids = [row["id"] for row in rows]
    shards = range(0, len(rows), SHARD)
    missing = [start for start in shards if not _shard(folder, start // SHARD).is_file()]
    progress = console.Progress(f"latents ({split})", len(rows), unit="photo")
    progress.start_at(len(rows) - sum(min(SHARD, len(rows) - start) for start in missing))
    pool = silhouettes(prepared, rows) if missing else []
    for start in missing:
        tensors = _encode(config, prepared, rows[start : start + SHARD], vae, encoder, pool, progress)
        artifacts.save_tensors(_shard(folder, start // SHARD), tensors, {"format": "deephair-latents-1", "key": key.latents(config)})
    return LatentCache(folder, ids)


def silhouettes(prepared: Prepared, rows: list[dict[str, Any]]) -> list[masks.Silhouette]:
    """Small hair masks of photos spread over ``rows``, for ``masks.borrow``."""
    pool = []
    for number in np.unique(np.linspace(0, len(rows) - 1, min(POOL, len(rows))).round().astype(int)):
        sample = prepared.sample(rows[int(number)])
        scale = POOL_SIDE / sample.hair.shape[0]
        box = None if sample.face_box is None else crop.scaled_box(sample.face_box, scale)
        pool.append(masks.Silhouette(crop.resize(sample.hair, POOL_SIDE), box))
    return pool


@dataclass(frozen=True)
class _Photo:
    """What the networks see of one photo: the sample, its heads with a region each, and its style picture (224, 224, 3) uint8."""

    sample: Sample
    heads: list[conditioning.HeadInput]
    style: NDArray[np.uint8]


def _encode(
    config: Config, prepared: Prepared, rows: list[dict[str, Any]], vae: Any, encoder: TextureEncoder, pool: list[masks.Silhouette],
    progress: console.Progress,
) -> dict[str, torch.Tensor]:  # fmt: skip
    columns: dict[str, list[torch.Tensor]] = {}
    threads = config.data.workers or cores(8)
    for photo in ahead(lambda row: _draw(config, prepared, row, pool), rows, workers=threads):
        for name, value in _encode_photo(config, photo, vae, encoder).items():
            columns.setdefault(name, []).append(value)
        progress.update()
    return {name: torch.stack(values) for name, values in columns.items()}


def _draw(config: Config, prepared: Prepared, row: dict[str, Any], pool: list[masks.Silhouette]) -> _Photo:
    sample = prepared.sample(row)
    heads = [
        conditioning.head_input(
            sample.photo,
            sample.hair,
            sample.face_box,
            method=config.data.bald,
            shape=masks.random_shape(rng),
            borrowed=masks.borrow(pool, sample.face_box, rng),
        )
        for rng in (numpy_generator(config.train.seed, "region/" + row["id"], variant) for variant in range(config.train.mask_variants))
    ]
    return _Photo(sample, heads, read_png(prepared.folder / row["files"]["style"]))


def _encode_photo(config: Config, photo: _Photo, vae: Any, encoder: TextureEncoder) -> dict[str, torch.Tensor]:
    sample, heads = photo.sample, photo.heads
    pictures = conditioning.to_tensor([sample.photo, *(head.bald for head in heads)])
    size = min(BATCH, max(1, BATCH_PIXELS // pictures[0, 0].numel()))
    encoded = [conditioning.encode_latents(vae, pictures[start : start + size]) for start in range(0, len(pictures), size)]
    means, stds = torch.cat([mean for mean, _ in encoded]).cpu(), torch.cat([std for _, std in encoded]).cpu()
    side = means.shape[-1]
    style = conditioning.style_features(encoder, [photo.style], config.train.style_tokens)[0]
    identity, valid = conditioning.identity_tensor([sample.identity])
    return {
        "photo_mean": means[0],
        "photo_std": stds[0],
        "bald": means[1:],
        "mask": conditioning.latent_mask(conditioning.mask_tensor([head.region for head in heads]), side).to(torch.uint8),
        "excluded": _excluded(sample.blurred, side),
        "style": style,
        "identity": identity[0],
        "identity_valid": valid.to(torch.uint8),
    }


def _excluded(blurred: NDArray[np.uint8], side: int) -> torch.Tensor:
    """Latent pixels that a blurred face touches, (1, side, side) uint8: they must not be learnt."""
    touched = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(blurred)[None].float(), side)
    return (touched > 0).to(torch.uint8)


class PromptCache:
    """Text embeddings of all distinct prompts, read on demand and kept: there are few thousand at most."""

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self._folder, self._key = folder, key
        self._loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def path(self, prompt: str) -> Path:
        """The file of one prompt."""
        return self._folder / f"{hashlib.sha256(f'{self._key.texts}/{prompt}'.encode()).hexdigest()[:32]}.safetensors"

    def get(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (77, D) and pooled (P,), float32."""
        if prompt not in self._loaded:
            tensors = artifacts.load_tensors(self.path(prompt))
            self._loaded[prompt] = (tensors["prompt_embeds"].float(), tensors["pooled"].float())
        return self._loaded[prompt]


def build_prompts(config: Config, prompts: set[str], key: CacheKey, *, device: torch.device, dtype: torch.dtype) -> PromptCache:
    """Encodes every prompt that has no file yet; the text encoders are loaded only if there is one, and leave memory afterwards."""
    cache = PromptCache(config.paths.processed / "prompt_embeddings", key)
    missing = [prompt for prompt in sorted(prompts) if not cache.path(prompt).is_file()]
    if missing:
        texts = conditioning.TextEncoders(conditioning.inpainting_folder(config.paths.weights), device=device, dtype=dtype)
        progress = console.Progress("prompts", len(missing), unit="prompt")
        for prompt in missing:
            embeds, pooled = texts.encode([prompt])
            artifacts.save_tensors(
                cache.path(prompt), {"prompt_embeds": embeds[0], "pooled": pooled[0]}, {"format": "deephair-prompt-1", "prompt": prompt}
            )
            progress.update()
    return cache
