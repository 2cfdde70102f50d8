"""Latents, prompts and style features computed once, so that no encoder sits in memory while the UNet trains (DESIGN 4.3).

``processed/latents/`` holds shards of samples, latents and style features apart, in folders named by a key that covers everything they
depend on. A prompt's embedding is one file per distinct prompt, ``processed/prompt_embeddings/{sha}.safetensors``.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend import artifacts, console
from backend.config import Config
from backend.errors import UsageError
from backend.imaging import crop, masks
from backend.machine import cores
from backend.training.evenly import evenly
from backend.training.keyed import numpy_generator
from backend.training.models.stage2_unet import IDENTITY_WIDTH, STYLE_WIDTH
from backend.training.models.texture_encoder import TextureEncoder
from backend.training.prefetch import ahead
from backend.training.prepared import Prepared, Sample
from backend.training.stage2_files import LAYOUT
from backend.tryon import conditioning
from backend.tryon.remembered import Remembered

logger = logging.getLogger(__name__)

SHARD = 256  # samples per file
POOL = 128  # silhouettes that a split's edit regions borrow from
POOL_SIDE = 128  # their side, px
RESIDENT = 2 << 30  # bytes of a split's samples that are kept in memory; beyond it they are read from mapped files
PROMPTS_KEPT = 256  # in memory; a real set has some 100,000 distinct ones of 0.3 MB each, more than a process may map


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

    def latents(self, config: Config, variants: int) -> str:
        """Short digest for the folder of latents with this many edit regions each."""
        return _short([self.data, self.vae, config.data.bald, variants, config.train.seed, LAYOUT])

    def styles(self, config: Config) -> str:
        """Short digest for the folder of style features: a new Stage 1 makes those anew, not the latents."""
        return _short([self.data, self.texture, config.train.style_tokens, LAYOUT])


def _short(parts: list[Any]) -> str:
    return artifacts.sha256_json(parts)[:16]


class Shards:
    """Cached tensors of samples in files of SHARD, found by their ids, whatever order they came in: a longer run adds what it lacks."""

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        from safetensors import safe_open

        places = {name: (path, row) for path in _files(folder) for row, name in enumerate(_ids(path))}
        paths = list(dict.fromkeys(places[name][0] for name in ids))
        number = {path: n for n, path in enumerate(paths)}
        self._shard = np.array([number[places[name][0]] for name in ids], np.int64)
        self._row = np.array([places[name][1] for name in ids], np.int64)
        self._open = [safe_open(path, framework="pt") for path in paths]
        self._resident = sum(path.stat().st_size for path in paths) <= RESIDENT
        self._columns: dict[str, torch.Tensor] = {}

    def names(self) -> list[str]:
        """The tensors that each sample has."""
        return list(self._open[0].keys())

    def shape(self, name: str) -> list[int]:
        """Of one sample's tensor."""
        return list(self._open[0].get_slice(name).get_shape()[1:])

    def take(self, name: str, indices: NDArray[np.int64]) -> torch.Tensor:
        """The tensors of several samples, by their place in ``ids``, stacked: (len(indices), ...)."""
        if not self._resident:
            parts = [self._open[self._shard[index]].get_slice(name)[int(self._row[index])] for index in indices]
            return torch.stack(parts)
        if name not in self._columns:
            whole = [shard.get_tensor(name) for shard in self._open]
            self._columns[name] = torch.stack([whole[shard][row] for shard, row in zip(self._shard, self._row, strict=True)])
        return self._columns[name][torch.from_numpy(indices)]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard_*.safetensors"))


def _ids(path: Path) -> list[str]:
    return list(artifacts.read_header(path)["ids"])


def fill(
    folder: Path, rows: Sequence[dict[str, Any]], encode: Callable[[Sequence[dict[str, Any]]], Iterator[dict[str, torch.Tensor]]], what: str
) -> Shards:
    """Encodes those ``rows`` that no shard of ``folder`` holds, and opens them all. A killed one goes on at the shard it was at."""
    missing = _lacking(folder, rows)
    progress = console.Progress(what, len(rows), unit="photo")
    progress.start_at(len(rows) - len(missing))
    for start in range(0, len(missing), SHARD):
        part, columns = missing[start : start + SHARD], dict[str, list[torch.Tensor]]()
        for tensors in encode(part):
            for name, value in tensors.items():
                columns.setdefault(name, []).append(value)
            progress.update()
        stacked = {name: torch.stack(values) for name, values in columns.items()}
        ids = [row["id"] for row in part]  # which are its name, so that two runs that lack different photos do not write the same file
        artifacts.save_tensors(folder / f"shard_{_short(ids)}.safetensors", stacked, {"format": "deephair-cache-2", "ids": ids})
    return Shards(folder, [row["id"] for row in rows])


class LatentCache:
    """Cached samples of one split. Of each: photo_mean, photo_std (4, h, w); bald (V, 4, h, w); mask (V, 1, h, w); excluded (1, h, w);
    style (S, 2048); identity (512,); identity_valid (1,)."""

    def __init__(self, ids: list[str], latents: Shards, styles: Shards) -> None:
        self.ids = ids
        self.variants = latents.shape("mask")[0]
        self._where = {name: part for part in (latents, styles) for name in part.names()}

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, name: str, indices: NDArray[np.int64]) -> torch.Tensor:
        """The tensors of several samples, stacked: (len(indices), ...)."""
        return self._where[name].take(name, indices)


def build_latents(
    config: Config, prepared: Prepared, split: str, rows: list[dict[str, Any]], variants: int, key: CacheKey, vae: Any, encoder: TextureEncoder
) -> LatentCache:  # fmt: skip
    """Encodes what is missing of these rows of a split, with ``variants`` edit regions each, and opens it."""
    latents, styles = _folders(config, split, variants, key)
    threads = config.data.workers or cores(8)
    pool = silhouettes(prepared, prepared.rows(split)) if _lacking(latents, rows) else []

    def encode(part: Sequence[dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
        for sample, heads in ahead(lambda row: _draw(config, prepared, row, pool, variants), part, workers=threads):
            yield _encoded(sample, heads, vae)

    def describe(part: Sequence[dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
        for style, identity in ahead(prepared.conditions, part, workers=threads):
            yield _described(config, style, identity, encoder)

    return LatentCache(
        [row["id"] for row in rows], fill(latents, rows, encode, f"latents ({split})"), fill(styles, rows, describe, f"styles ({split})")
    )


def _folders(config: Config, split: str, variants: int, key: CacheKey) -> tuple[Path, Path]:
    """Where a split's latents and style features lie."""
    root = config.paths.processed / "latents"
    return root / f"{split}_{key.latents(config, variants)}", root / f"{split}_styles_{key.styles(config)}"


def _lacking(folder: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no shard of a folder holds."""
    known = {name for path in _files(folder) for name in _ids(path)}
    return [row for row in rows if row["id"] not in known]


def require_room(
    config: Config, rows: Mapping[str, Sequence[dict[str, Any]]], variants: int, key: CacheKey, prompts: set[str], number_bytes: int
) -> None:  # fmt: skip
    """Raises UsageError where the disk cannot hold what is missing of the caches of these rows by split, where an encoder's number takes
    ``number_bytes``; before anything is encoded."""
    width = artifacts.read_json(conditioning.inpainting_folder(config.paths.weights) / "unet" / "config.json")["cross_attention_dim"]
    cache = PromptCache(config.paths.processed / "prompt_embeddings", key)
    size = sum(not cache.path(prompt).is_file() for prompt in prompts) * conditioning.TOKENS * width * number_bytes
    for split, chosen in rows.items():
        latents, styles = _folders(config, split, variants, key)
        size += len(_lacking(latents, chosen)) * sample_bytes(config, variants, number_bytes)
        size += len(_lacking(styles, chosen)) * 4 * (config.train.style_tokens * STYLE_WIDTH + IDENTITY_WIDTH)
    require_space(config.paths.processed / "latents", size)


def sample_bytes(config: Config, variants: int, number_bytes: int) -> int:
    """What one photo's latents take on disk, where a latent takes ``number_bytes``."""
    return (config.data.resolution // 8) ** 2 * (4 * number_bytes * (2 + variants) + variants + 1)


def require_space(folder: Path, size: int) -> None:
    """Raises UsageError where the disk of ``folder`` has less than ``size`` bytes left; says which older caches could go."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UsageError(
            f"what is to be cached takes {size / 1e9:.1f} GB and the disk of {folder} has {free / 1e9:.1f} GB left",
            hint="remove caches of earlier settings there, lower train.steps or data.resolution, or move paths.processed",
        )
    if size > 1e9:
        logger.info(
            "what is to be cached takes %.1f GB of the %.1f GB that are free; latents of other settings in %s can be deleted",
            size / 1e9,
            free / 1e9,
            folder,
        )


def silhouettes(prepared: Prepared, rows: list[dict[str, Any]]) -> list[masks.Silhouette]:
    """Small hair masks of photos spread over ``rows``, for ``masks.borrow``."""
    pool = []
    for number in evenly(len(rows), POOL):
        sample = prepared.sample(rows[int(number)])
        scale = POOL_SIDE / sample.hair.shape[0]
        box = None if sample.face_box is None else crop.scaled_box(sample.face_box, scale)
        pool.append(masks.Silhouette(crop.resize(sample.hair, POOL_SIDE), box))
    return pool


def _draw(
    config: Config, prepared: Prepared, row: dict[str, Any], pool: list[masks.Silhouette], variants: int
) -> tuple[Sample, list[conditioning.HeadInput]]:  # fmt: skip
    """A photo with that many edit regions."""
    sample = prepared.sample(row)
    generators = (numpy_generator(config.train.seed, "region/" + row["id"], variant) for variant in range(variants))
    return sample, [
        conditioning.head_input(
            sample.photo,
            sample.hair,
            sample.face_box,
            method=config.data.bald,
            shape=masks.random_shape(rng),
            borrowed=masks.borrow(pool, sample.face_box, rng),
        )
        for rng in generators
    ]


def _encoded(sample: Sample, heads: list[conditioning.HeadInput], vae: Any) -> dict[str, torch.Tensor]:
    mean, std = (
        value.cpu() for value in conditioning.encode_latents(vae, conditioning.to_tensor([sample.photo, *(h.bald for h in heads)]))
    )
    side = mean.shape[-1]
    return {
        "photo_mean": mean[0],
        "photo_std": std[0],
        "bald": mean[1:],
        "mask": conditioning.latent_mask(conditioning.mask_tensor([head.region for head in heads]), side).to(torch.uint8),
        "excluded": _excluded(sample.blurred, side),
    }


def _described(config: Config, style: NDArray[np.uint8], identity: NDArray[np.float32] | None, encoder: TextureEncoder) -> dict[str, torch.Tensor]:  # fmt: skip
    known, valid = conditioning.identity_tensor([identity])
    return {
        "style": conditioning.style_features(encoder, [style], config.train.style_tokens)[0],
        "identity": known[0],
        "identity_valid": valid.to(torch.uint8),
    }


def _excluded(blurred: NDArray[np.uint8], side: int) -> torch.Tensor:
    """Latent pixels that a blurred face touches, (1, side, side) uint8: they must not be learnt."""
    touched = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(blurred)[None].float(), side)
    return (touched > 0).to(torch.uint8)


class PromptCache:
    """Text embeddings of distinct prompts, one file each; those asked for last stay in memory."""

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self._folder, self._key = folder, key
        self._loaded: Remembered[str, tuple[torch.Tensor, torch.Tensor]] = Remembered(PROMPTS_KEPT)
        self._lock = threading.Lock()  # batches are drawn in several threads

    def path(self, prompt: str) -> Path:
        """The file of one prompt."""
        return self._folder / f"{hashlib.sha256(f'{self._key.texts}/{prompt}'.encode()).hexdigest()[:32]}.safetensors"

    def get(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (77, D) and pooled (P,), float32."""
        with self._lock:
            return self._loaded.get(prompt, lambda: self._read(prompt))

    def _read(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = artifacts.load_tensors(self.path(prompt))
        return tensors["prompt_embeds"].float(), tensors["pooled"].float()


def build_prompts(config: Config, prompts: set[str], key: CacheKey, *, device: torch.device, dtype: torch.dtype) -> PromptCache:
    """Encodes every prompt that has no file yet; the text encoders are loaded only if there is one, and leave memory afterwards."""
    cache = PromptCache(config.paths.processed / "prompt_embeddings", key)
    missing = [prompt for prompt in sorted(prompts) if not cache.path(prompt).is_file()]
    if missing:
        texts = conditioning.TextEncoders(conditioning.inpainting_folder(config.paths.weights), device=device, dtype=dtype)
        progress = console.Progress("prompts", len(missing), unit="prompt")
        for prompt in missing:
            embeds, pooled = (
                value[0].to(dtype) for value in texts.encode([prompt])
            )  # as it was computed: half of float32's disk on a card
            tensors, header = {"prompt_embeds": embeds, "pooled": pooled}, {"format": "deephair-prompt-2", "prompt": prompt}
            artifacts.save_tensors(cache.path(prompt), tensors, header)
            progress.update()
    return cache
