"""One step of Stage 1 on one process or several: views, network, the four losses, update (DESIGN 4.2)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from backend.config import TextureConfig
from backend.training import checkpoints, keyed
from backend.training.averaging import follow
from backend.training.models.supcon import Labels, masked_cross_entropy, supcon_loss
from backend.training.models.texture_encoder import EMBEDDING, HEADS, TextureEncoder, TextureOutput
from backend.training.processes import Processes
from backend.training.texture_data import Batch, Ints, PatchTable, augment, draw_views

_LIVE = "|weight"


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth its precision: on a card that has it, and on a CPU with instructions for it (benchmarks/stage1.py)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class Trainer:
    """The encoder with its optimizer: takes steps, and goes into and comes out of checkpoints. Knows no files of its own."""

    def __init__(self, config: TextureConfig, encoder: TextureEncoder, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.encoder = encoder.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.count > 1 and processes.device.type == "cuda":
            # Each card alone would normalise by its own share of the batch; so statistics are taken over all of it.
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)  # type: ignore[no-untyped-call]
        self.average = copy.deepcopy(self.encoder).eval().requires_grad_(False) if config.ema else None
        self.model: nn.Module = self.encoder if processes.count == 1 else nn.parallel.DistributedDataParallel(self.encoder)
        self.names = {parameter: name for name, parameter in self.encoder.named_parameters()}
        matrices = [p for p in self.names if p.ndim > 1]
        vectors = [p for p in self.names if p.ndim == 1]  # biases and batch-norm scales are not decayed
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.bf16 = config.precision == "bf16" and computes_bf16(processes.device)

    @property
    def judged(self) -> TextureEncoder:
        """The encoder that is validated and kept: the average where there is one, else the one that learns."""
        return self.encoder if self.average is None else self.average

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Arguments for ``checkpoints.save``. With an average, that is the checkpoint's weights, and the live ones lie beside the optimizer's
        tensors as ``{name}|weight``."""
        optimizer = checkpoints.optimizer_tensors(self.optimizer, self.names)
        if self.average is not None:
            optimizer |= {f"{name}{_LIVE}": value for name, value in self.encoder.state_dict().items()}
        return {"weights": self.judged.state_dict(), "optimizer": optimizer}

    def restore(self, saved: checkpoints.Checkpoint) -> None:
        """Puts a checkpoint back."""
        self.judged.load_state_dict(saved.weights)
        if self.average is not None:
            self.encoder.load_state_dict({k.removesuffix(_LIVE): v for k, v in saved.optimizer.items() if k.endswith(_LIVE)})
        of_optimizer = {key: value for key, value in saved.optimizer.items() if not key.endswith(_LIVE)}
        checkpoints.restore_optimizer(self.optimizer, self.names, of_optimizer)

    def step(self, batch: Batch, labels: Labels) -> dict[str, float]:
        """One update. ``labels`` are those of the whole batch. Returns the losses; raises FloatingPointError before a non-finite update."""
        config, device = self.config, self.processes.device
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * keyed.warmup_cosine(batch.step, warmup=config.warmup, total=config.steps)
        losses = self.losses(batch, labels.to(device))
        total = losses["curl"] + losses["volume"] + config.supcon_weight * losses["supcon"] + config.colour_weight * losses["colour"]
        self.optimizer.zero_grad(set_to_none=True)
        # Each process differentiates its own rows of the common loss, and DDP takes the mean over processes: hence the factor.
        (total * self.processes.count).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        names = ["loss", *losses, "gradient_norm"]
        values = dict(zip(names, torch.stack([total, *losses.values(), norm]).tolist(), strict=True))
        if not torch.isfinite(torch.tensor(list(values.values()))).all():
            raise FloatingPointError(", ".join(f"{name} {value:g}" for name, value in values.items()))
        self.optimizer.step()
        if self.average is not None:
            follow(self.average.state_dict(), self.encoder.state_dict(), config.ema, batch.step)
        return values

    def losses(self, batch: Batch, labels: Labels) -> dict[str, Tensor]:
        """The four terms over the whole batch, float32 scalars."""
        config, processes = self.config, self.processes
        size, device = len(batch.patches), processes.device
        rows = processes.rows(size)
        views = draw_views(size, config.seed, batch.step)[:, rows].to(device)
        # Half a million numbers: a card draws its own, sooner than a CPU could.
        draw = keyed.torch_generator(config.seed, "texture dropout", batch.step, device=device)
        dropout = torch.rand((2, size, HEADS, EMBEDDING), generator=draw, device=device)
        images = augment(batch.images.to(device, non_blocking=True), views)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            output: TextureOutput = self.model(images, dropout[:, rows].flatten(0, 1))
        seen = labels.repeated(self._order(size).to(device))
        projection, curl, volume = (processes.all_rows(t.float()) for t in (output.projection, output.curl_logits, output.volume_logits))
        return {
            "curl": masked_cross_entropy(curl, seen.curl),
            "volume": masked_cross_entropy(volume, seen.volume),
            "supcon": supcon_loss(projection, seen.joint, seen.group, temperature=config.temperature),
            "colour": processes.all_rows(colour_error(output.colour, images)).mean(),
        }

    def _order(self, size: int) -> Tensor:
        """Which row of the batch each gathered output belongs to: every process sends first views, then second views."""
        parts = torch.arange(size).chunk(self.processes.count)
        return torch.cat([torch.cat([part, part]) for part in parts])


def colour_error(found: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (B,) of the colour read in each cell, over the variance of a uniform colour (1/12). found (B, 3, h, w), images
    (B, 3, H, W) in [0, 1]."""
    wanted = nn.functional.adaptive_avg_pool2d(images, (found.shape[2], found.shape[3]))
    return 12.0 * (found.float() - wanted).square().mean(dim=(1, 2, 3))


def labels_of(table: PatchTable, patches: Ints) -> Labels:
    """The labels of some patches by number."""
    return Labels(*(torch.from_numpy(values[patches]) for values in (table.curl, table.volume, table.group)))
