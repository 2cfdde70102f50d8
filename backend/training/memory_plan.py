"""What a Stage 2 run will take on the card, line by line, before anything is loaded (training_memory.md, sections 1.2 and 8)."""

from __future__ import annotations

from typing import Any

from backend import artifacts, weights
from backend.config import Config, TrainConfig
from backend.training import presets
from backend.training.lowmem import BLOCK
from backend.training.models.stage2_unet import SDXL_UNET_CONFIG, HairInpaintingUNet, empty_unet, widen_conv_in

GIB = 2**30
ACTIVATION_GIB = 0.675  # per sample at 1024 px with gradient checkpointing, SDXL; simulated with the real network's tensors
NO_CHECKPOINTING = 6.42 / 0.70  # how much more is kept without checkpointing
TEXTURE_GIB = 0.72  # per sample and 256 px crop, from the peak of benchmarks/stage2_gpu.py's capped arm on an H200
CONTEXT_GIB = 0.6  # CUDA context and library workspaces
USABLE = 0.93  # of a card's nominal memory; the rest is the driver's and the desktop's
HOST_COPIES = 4  # weights, gradients and AdamW's two states
SDXL_WIDTH, SDXL_PIXELS = 320, 1024 * 1024


def memory_plan(config: Config) -> dict[str, Any]:
    """The plan as {"preset", "lines": [{"name", "gib"}], "total_gib", "host_gib", "card_gib", "basis"}; estimates in GiB of device memory.

    host_gib: what a preset that offloads keeps in host memory instead. card_gib: the size of card that the preset is made for, nominal.
    The UNet is built on the meta device from its configuration (SDXL's own when the weights are not here yet): no weight is loaded.
    """
    import torch

    from backend.training.stage2_weights import choose_trained

    train, preset = config.train, presets.of(config.train)
    unet_config, basis = _unet_config(config)
    with torch.device("meta"):
        model = HairInpaintingUNet(widen_conv_in(empty_unet(unet_config)), train.style_tokens, train.injection)
        count = sum(parameter.numel() for parameter in model.parameters())
        model.unet.to(torch.bfloat16 if preset.bf16 else torch.float32)
        choose_trained(model, train)
    parameters = list(model.parameters())
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    width = unet_config["block_out_channels"][0] / SDXL_WIDTH
    share = (config.data.resolution**2 / SDXL_PIXELS) * width
    activations = ACTIVATION_GIB * share * train.batch_size * (1.0 if train.gradient_checkpointing else NO_CHECKPOINTING)
    activations *= 1 if preset.bf16 or preset.autocast else 2  # float32
    learnt = sum(parameter.numel() for parameter in learning)
    host, lent = (list(model.unet.parameters()), _lent_bytes(model.unet, train)) if preset.offload else ([], 0)
    hosted = set(host)  # the rest is the card's
    parameters, learning = ([p for p in part if p not in hosted] for part in (parameters, learning))
    lines = [
        (f"weights, {count:,} parameters in {'bfloat16' if preset.bf16 else 'float32'}", (lent + sum(p.nbytes for p in parameters)) / GIB),
        _gradients(learning, train),
        (_optimizer_name(preset), _optimizer_bytes([(p.numel(), p.shape) for p in learning], preset) / GIB),
        (f"activations, batch {train.batch_size} at {config.data.resolution} px", activations),
        ("update in float32, one tensor at a time", 0.0 if preset.adamw else 4 * max(p.numel() for p in learning) / GIB),
        ("VAE (decoder of the texture loss and previews)", 0.16 * width),
    ]
    if preset.autocast:
        lines.append(("weights' bfloat16 copies of autocast", count * 2 / GIB))
    if train.texture_every:
        crop = 8 * train.texture_crop
        at_once = 1 if train.gradient_checkpointing else train.batch_size
        lines.append((f"texture loss, {at_once} crop(s) of {crop} px at a time", TEXTURE_GIB * at_once * (crop / 256) ** 2))
    lines.append(("CUDA context and workspaces", CONTEXT_GIB))
    return {
        "preset": train.preset,
        "trained_parameters": learnt,
        "lines": [{"name": name, "gib": round(gib, 3)} for name, gib in lines],
        "total_gib": round(sum(gib for _, gib in lines), 3),
        "host_gib": round(HOST_COPIES * sum(p.nbytes for p in host) / GIB, 3),
        "card_gib": preset.card_gib,
        "basis": basis,
    }


def _lent_bytes(unet: Any, train: TrainConfig) -> int:
    """The most that an offloaded UNet (``offload``) has on the card: layers outside the recomputed blocks from forward to backward pass, and
    one block with its gradients; all weights where nothing is recomputed."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    every = sum(p.nbytes for p in unet.parameters())
    if not train.gradient_checkpointing:
        return every
    blocks = [
        sum(p.nbytes for p in module.parameters()) for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)
    ]
    return every - sum(blocks) + 2 * max(blocks)


def _gradients(learning: list[Any], train: TrainConfig) -> tuple[str, float]:
    if presets.of(train).inside_backward:
        return "gradients (freed inside the backward pass)", 0.0
    numbers = sum(p.numel() for p in learning)
    if presets.of(train).adamw:
        return "gradients in float32", 4 * numbers / GIB
    if train.accumulate > 1:
        return f"gradients of {numbers:,} parameters, summed in float32", 4 * numbers / GIB
    return f"gradients of {numbers:,} parameters", sum(p.nbytes for p in learning) / GIB


def plan_text(plan: dict[str, Any]) -> str:
    """The plan as a small table."""
    rows = [f"  {line['gib']:8.3f} GiB  {line['name']}" for line in plan["lines"]]
    fits = plan["total_gib"] <= USABLE * plan["card_gib"]
    verdict = f"fits a {plan['card_gib']} GB card" if fits else f"MORE than a {plan['card_gib']} GB card offers: lower train.batch_size"
    return "\n".join(
        [
            f"memory plan, preset {plan['preset']} ({plan['basis']}; estimated)",
            *rows,
            f"  {plan['total_gib']:8.3f} GiB  in all, {plan['trained_parameters']:,} parameters learn; {verdict}",
            *([f"  {plan['host_gib']:8.3f} GiB  of host memory: weights, gradients and optimizer of the UNet"] if plan["host_gib"] else []),
        ]
    )


def shortage(plan: dict[str, Any], bound_gib: float) -> str:
    """Says where the plan is more than the allocator may have, and what helps; empty where it fits."""
    wanted = plan["total_gib"] - CONTEXT_GIB  # which the allocator does not see
    if wanted <= bound_gib:
        return ""
    return (
        f"the plan wants {wanted:.1f} GiB and {bound_gib:.1f} GiB of the card are free for it: close what else uses the card (nvidia-smi shows it; "
        "a desktop or Windows takes some), or take a smaller preset; stopping now and changing the settings costs nothing, later it means a new run"
    )


def plan_and_measured(plan: dict[str, Any], *, weights: int, optimizer: int, peak: int) -> str:
    """The plan beside what a run held, in bytes: its trained network, its optimizer's state, the allocator's peak.

    The rest of the peak cannot be told apart. It stands against the plan's other lines but the CUDA context, which the allocator does not see.
    """
    lines = [line["gib"] for line in plan["lines"] if not line["name"].startswith("CUDA context")]
    planned = (lines[0], lines[2], sum(lines) - lines[0] - lines[2], sum(lines))
    measured = (weights, optimizer, peak - weights - optimizer, peak)
    names = ("weights", "optimizer", "activations and all else at the peak", "in all, without the CUDA context")
    rows = [f"  {a:8.3f} {b / GIB:9.3f} GiB  {name}" for a, b, name in zip(planned, measured, names, strict=True)]
    return "\n".join([f"memory of preset {plan['preset']}: planned, and measured while it trained", *rows])


def _unet_config(config: Config) -> tuple[dict[str, Any], str]:
    path = weights.folder(config.paths.weights, "inpainting") / "unet" / "config.json"
    if path.is_file():
        return artifacts.read_json(path), f"the UNet in {path.parent}"
    return SDXL_UNET_CONFIG, "SDXL inpainting 0.1 as published; its weights are not here yet"


def _optimizer_name(preset: presets.Preset) -> str:
    if preset.adamw:
        return "optimizer: AdamW in float32"
    return "optimizer: 8-bit momentum and factored second moment" if preset.momentum else "optimizer: factored second moment"


def _optimizer_bytes(sizes: list[tuple[int, Any]], preset: presets.Preset) -> int:
    if preset.adamw:
        return sum(8 * numel for numel, _ in sizes)
    factored = sum(4 * (shape[0] + numel // shape[0] if len(shape) > 1 else numel) for numel, shape in sizes)
    return factored + (sum(numel + 4 * -(-numel // BLOCK) for numel, _ in sizes) if preset.momentum else 0)
