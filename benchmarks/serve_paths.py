"""The pipeline of benchmarks/serve.py: one head crop by plain diffusers and by ours, and whole try-ons with references new and known."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend.config import Config
from backend.demo import miniature
from backend.tryon import conditioning
from backend.tryon.painter import Painter, PaintRequest, device_and_dtype
from backend.tryon.pipeline import REFERENCES, TryOn, TryOnRequest
from backend.tryon.placement import Placement
from backend.tryon.remembered import Remembered

PROMPT = "a photo of a person with long wavy black hair"


def sdxl_painter(config: Config, folder: Path) -> Any:
    """The painter over random networks of SDXL's size, made on the device; the text encoders take the way through a weights folder."""
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from backend.training.models.texture_encoder import new_encoder
    from benchmarks.stage2_parts import SCHEDULER, SIZES, random_model, random_vae

    miniature.build(folder)  # tokenizers, and the layout
    config = config.model_copy(update={"paths": config.paths.model_copy(update={"weights": folder})})
    device, dtype = device_and_dtype(config)
    inpainting = conditioning.inpainting_folder(folder)
    shapes = {
        "text_encoder": (
            CLIPTextModel,
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        ),
        "text_encoder_2": (
            CLIPTextModelWithProjection,
            {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
        ),
    }
    for name, (kind, shape) in shapes.items():
        small = CLIPTextConfig.from_pretrained(inpainting / name)
        ids = {key: getattr(small, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")}
        shutil.rmtree(inpainting / name)
        with torch.device(device):
            encoder = kind(CLIPTextConfig(**shape, **ids, vocab_size=49408, projection_dim=shape["hidden_size"]))
        encoder.to(dtype).save_pretrained(inpainting / name)
    EulerDiscreteScheduler.from_config(SCHEDULER).save_pretrained(inpainting / "scheduler")
    size = SIZES["full"]
    model = random_model(size, config.train.style_tokens, device, dtype).eval()
    encoder = new_encoder(config.texture.layers, dropout=0.0, seed=0).eval()
    return Painter(model, encoder, config, vae=random_vae(size, device, dtype))


def paths(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one head crop by each path, and how many times faster than plain diffusers it is."""
    if options.size == "bundle":
        tryon = TryOn.load(config)
        return painted(tryon._painter, int(tryon.header["resolution"]), config, options)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        painter = sdxl_painter(config, weights)
        config = config.model_copy(update={"paths": config.paths.model_copy(update={"weights": weights})})
        return painted(painter, 1024, config, options)


class Arms:
    """One head crop, noise for a photo, painted in different ways by the networks of one painter."""

    def __init__(self, painter: Painter, side: int, config: Config, options: argparse.Namespace) -> None:
        self.painter, self.side, self.options = painter, side, options
        self.guidance, self.sampler = config.sample.guidance, painter.sampler
        parameter = next(painter.sampler.model.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.folder = conditioning.inpainting_folder(config.paths.weights)
        rng = np.random.default_rng(0)
        self.photo = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        self.region = np.zeros((side, side), np.uint8)
        self.region[: side // 2] = 255
        self.style = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        self.known = painter.style_features(self.style)

    def by_diffusers(self) -> Callable[[], None]:
        """Plain diffusers, with the same networks, steps and guidance."""
        from diffusers import StableDiffusionXLInpaintPipeline

        plain = StableDiffusionXLInpaintPipeline.from_pretrained(
            self.folder, unet=self.sampler.model.unet, vae=self.sampler.vae, torch_dtype=self.dtype, local_files_only=True
        ).to(self.device)
        plain.set_progress_bar_config(disable=True)
        picture = torch.from_numpy(self.photo).permute(2, 0, 1)[None].float() / 255
        mask = torch.from_numpy(self.region > 0)[None, None].float()

        def paint() -> None:
            plain(
                prompt=PROMPT, image=picture, mask_image=mask, height=self.side, width=self.side, strength=1.0, output_type="pt",
                num_inference_steps=self.options.steps, guidance_scale=self.guidance, generator=torch.Generator().manual_seed(0),
            )  # fmt: skip

        return paint

    def by_us(self, *, look: Any = None, few: bool = False, **changes: Any) -> Callable[[], None]:
        """Ours; ``look`` a picture whose features are not known yet. few: LCM's sampler without guidance, in ``options.few`` steps."""
        head = conditioning.HeadInput(self.region, self.photo, np.zeros_like(self.photo))
        steps, guidance = (self.options.few, 1.0) if few else (self.options.steps, self.guidance)
        sampler = dataclasses.replace(self.sampler, **changes, few_step="lcm" if few else None)

        def paint() -> None:
            self.painter.sampler = sampler
            request = PaintRequest(head, self.known if look is None else look, None, PROMPT, 0)
            self.painter.paint([request], steps=steps, guidance=guidance)

        return paint

    def forgetful(self) -> None:
        """With nothing remembered."""
        self.painter._remembered = Remembered(1)
        self.by_us(look=self.style)()

    def channels_last(self) -> None:
        """The networks in the other memory format, and back."""
        for memory_format in (torch.channels_last, torch.contiguous_format):
            for network in (self.sampler.model.unet, self.sampler.vae):
                network.to(memory_format=memory_format)
            if memory_format == torch.channels_last:
                self.by_us()()

    def compiled(self, name: str, *, few: bool) -> dict[str, list[float]]:
        """Compiles for the arm, then times it."""
        for network in (self.sampler.model, self.sampler.vae):
            network.to(self.device)
        self.painter.sampler = dataclasses.replace(self.sampler, few_step="lcm" if few else None)
        began = time.perf_counter()
        self.painter.compile(self.side, 1.0 if few else self.guidance)
        print(f"{name}: compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        return measured({name: self.by_us(few=few)}, self.options.repeats, self.device)


def painted(painter: Painter, side: int, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """The arms of ``paths`` over the networks of a painter: those that are asked for, and plain diffusers."""
    arms = Arms(painter, side, config, options)
    few = f"lcm, {options.few} steps"
    ways: dict[str, Callable[[], None]] = {
        "ours, nothing remembered": arms.forgetful,
        "ours, prompt remembered": arms.by_us(look=arms.style),
        "ours, prompt and reference remembered": arms.by_us(),
        f"ours, {few}": arms.by_us(few=True),
    }
    on_card = arms.device.type == "cuda"
    if on_card:
        ways["ours, channels last"] = arms.channels_last

    def asked(name: str) -> bool:
        return any(part in name for part in options.arms)

    times = measured({"diffusers": arms.by_diffusers(), **{n: way for n, way in ways.items() if asked(n)}}, options.repeats, arms.device)
    if on_card and asked("ours, offload"):  # by itself: it leaves the networks at rest
        away = Placement(arms.device, torch.device("cpu"))
        times |= measured({"ours, offload": arms.by_us(placement=away)}, options.repeats, arms.device)
    for name, is_few in (("compiled", False), (f"compiled, {few}", True)):
        if options.compile and asked(name):
            times |= arms.compiled(name, few=is_few)
    reference = statistics.median(times["diffusers"])
    return {
        name: {
            "seconds": round(statistics.median(values), 3),
            "times_faster": round(reference / statistics.median(values), 3),
            "runs": len(values),
        }
        for name, values in times.items()
    }


def references(config: Config, options: argparse.Namespace, target: NDArray[np.uint8], reference: NDArray[np.uint8]) -> dict[str, Any]:
    """Seconds of a whole try-on: detection, masks, painting, paste-back; with a reference seen for the first time, and again."""
    tryon = TryOn.load(config)

    def again() -> None:
        tryon.run(TryOnRequest(target, reference, steps=options.steps, remember=True))

    def first() -> None:
        tryon._references = Remembered(REFERENCES)
        again()

    times = measured({"new": first, "remembered": again}, options.repeats, device_and_dtype(config)[0])
    return {name: {"seconds": round(statistics.median(values), 3), "runs": len(values)} for name, values in times.items()}


def measured(arms: dict[str, Callable[[], None]], repeats: int, device: Any) -> dict[str, list[float]]:
    """Seconds of each arm, in turn, after one run of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            print(f"{name}: {seconds:.3f} s{'' if repeat else ' (not counted)'}", file=sys.stderr)
            if repeat:
                times[name].append(seconds)
    return times
