"""What a Stage 2 run will take on the card, line by line, before anything is loaded (training_memory.md, sections 1.2 and 8)."""

from __future__ import annotations

from typing import Any

from backend import artifacts, weights
from backend.config import Config
from backend.training.lowmem import BLOCK
from backend.training.models.stage2_unet import SDXL_UNET_CONFIG, HairInpaintingUNet, empty_unet, widen_conv_in

GIB = 2**30
ACTIVATION_GIB = 0.675  # per sample at 1024 px with gradient checkpointing, SDXL; simulated with the real network's tensors
NO_CHECKPOINTING = 6.42 / 0.70  # how much more is kept without checkpointing
TRANSIENT_GIB = 0.12  # float32 copies of the largest tensor during its update, SDXL
CONTEXT_GIB = 0.6  # CUDA context and library workspaces
SDXL_WIDTH, SDXL_PIXELS = 320, 1024 * 1024


def memory_plan(config: Config) -> dict[str, Any]:
    """The plan as {"preset", "lines": [{"name", "gib"}], "total_gib", "basis"}; lines are estimates in GiB of device memory.

    The UNet is built on the meta device from its configuration (SDXL's own when the weights are not here yet): no weight is loaded.
    """
    import torch

    unet_config, basis = _unet_config(config)
    with torch.device("meta"):
        model = HairInpaintingUNet(widen_conv_in(empty_unet(unet_config)), config.train.style_tokens)
    sizes = [(parameter.numel(), parameter.shape) for parameter in model.parameters()]
    count = sum(numel for numel, _ in sizes)
    fused = config.train.preset == "full-12gb"
    share = (config.data.resolution**2 / SDXL_PIXELS) * (unet_config["block_out_channels"][0] / SDXL_WIDTH)
    activations = ACTIVATION_GIB * share * config.train.batch_size * (1.0 if config.train.gradient_checkpointing else NO_CHECKPOINTING)
    if not fused:
        activations *= 2  # float32
    vae = 0.16 * unet_config["block_out_channels"][0] / SDXL_WIDTH
    lines = [
        (f"weights, {count:,} parameters in {'bfloat16' if fused else 'float32'}", count * (2 if fused else 4) / GIB),
        ("gradients" + (" (freed inside the backward pass)" if fused else ""), 0.0 if fused else count * 4 / GIB),
        (
            "optimizer: 8-bit momentum and factored second moment" if fused else "optimizer: AdamW in float32",
            _optimizer_bytes(sizes, fused) / GIB,
        ),
        (f"activations, batch {config.train.batch_size} at {config.data.resolution} px", activations),
        ("update in float32, one tensor at a time", TRANSIENT_GIB * unet_config["block_out_channels"][0] / SDXL_WIDTH if fused else 0.0),
        ("VAE (decoder of the texture loss and previews)", vae),
    ]
    if config.train.texture_every:
        lines.append((f"texture loss on a {8 * config.train.texture_crop} px crop", 0.6 * (8 * config.train.texture_crop / 256) ** 2))
    lines.append(("CUDA context and workspaces", CONTEXT_GIB))
    return {
        "preset": config.train.preset,
        "lines": [{"name": name, "gib": round(gib, 3)} for name, gib in lines],
        "total_gib": round(sum(gib for _, gib in lines), 3),
        "basis": basis,
    }


def plan_text(plan: dict[str, Any]) -> str:
    """The plan as a small table."""
    rows = [f"  {line['gib']:8.3f} GiB  {line['name']}" for line in plan["lines"]]
    return "\n".join(
        [f"memory plan, preset {plan['preset']} ({plan['basis']}; estimated)", *rows, f"  {plan['total_gib']:8.3f} GiB  in all"]
    )


def _unet_config(config: Config) -> tuple[dict[str, Any], str]:
    path = weights.folder(config.paths.weights, "inpainting") / "unet" / "config.json"
    if path.is_file():
        return artifacts.read_json(path), f"the UNet in {path.parent}"
    return SDXL_UNET_CONFIG, "SDXL inpainting 0.1 as published; its weights are not here yet"


def _optimizer_bytes(sizes: list[tuple[int, Any]], fused: bool) -> int:
    if not fused:
        return sum(8 * numel for numel, _ in sizes)
    return sum(numel + 4 * -(-numel // BLOCK) + 4 * (shape[0] + numel // shape[0] if len(shape) > 1 else numel) for numel, shape in sizes)
