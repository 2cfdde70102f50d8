"""Where the curl of hair is lost: a small network is taught to read the curl class from pictures, from latents, from the mask.

    python benchmarks/curl_probe.py --config configs/miniature.yaml [--epochs 10]

Needs the processed set of that configuration and its autoencoder. Each reader sees the hair of training heads and is judged on heads of
val and test: of the photo at training resolution, of its latents, of the decoded latents, and of the hair's mask alone. What the reader
of the photo gets and the reader of the latents does not was dropped by the encoder, and no UNet can paint it.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.config import load_config
from backend.training import metrics
from backend.training.prepared import Prepared
from backend.tryon import conditioning

CLASSES = 4
Views = dict[str, Tensor]


@torch.no_grad()
def views(prepared: Prepared, rows: list[dict[str, Any]], vae: Any) -> Views:
    """What the readers see of the photos, each (N, C, h, w) with the mask as its last channel."""
    found: dict[str, list[Tensor]] = {"photo": [], "latents": [], "decoded": [], "mask": []}
    for start in range(0, len(rows), 32):
        samples = [prepared.sample(row) for row in rows[start : start + 32]]
        photo, hair = conditioning.to_tensor([one.photo for one in samples]), conditioning.mask_tensor([one.hair for one in samples])
        latents = conditioning.encode_latents(vae, photo)[0]
        small = functional.adaptive_avg_pool2d(hair, latents.shape[-1])
        found["photo"].append(torch.cat([photo * hair, hair], dim=1))
        found["latents"].append(torch.cat([latents * small, small], dim=1))
        found["decoded"].append(torch.cat([conditioning.decode_latents(vae, latents) * hair, hair], dim=1))
        found["mask"].append(hair)
    return {name: torch.cat(parts) for name, parts in found.items()}


def reader(channels: int, side: int) -> nn.Sequential:
    """Convolutions down to 8 x 8 cells, their mean, four classes."""
    widths = (24, 32, 64, 96)[-max(1, round(np.log2(side / 8))) :]
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels, CLASSES))


def taught(pictures: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Sequential:
    """A reader after ``epochs`` over mirrored and, but for the mask, brightened and darkened pictures."""
    torch.manual_seed(seed)
    net = reader(pictures.shape[1], pictures.shape[-1])
    steps = epochs * len(pictures) // 32
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(steps, 2))
    for step in range(steps):
        rows = torch.randint(len(pictures), (32,))
        batch = pictures[rows].flip(3) if step % 2 else pictures[rows]
        batch = torch.cat([batch[:, :-1] * (0.8 + 0.4 * torch.rand(len(batch), 1, 1, 1)), batch[:, -1:]], dim=1)
        functional.cross_entropy(net(batch), labels[rows], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yaml")
    parser.add_argument("--epochs", type=int, default=10, help="over pictures; latents get three times as many")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    prepared = Prepared(config.paths.processed)
    vae = conditioning.load_vae(conditioning.inpainting_folder(config.paths.weights), device=torch.device("cpu"), dtype=torch.float32)
    rows = {split: [row for row in prepared.rows(split) if row["curl"] is not None] for split in ("train", "val", "test")}
    seen, unseen = rows["train"], rows["val"] + rows["test"]
    fit, new = views(prepared, seen, vae), views(prepared, unseen, vae)
    labels, truth = (torch.tensor([row["curl"] for row in part]) for part in (seen, unseen))
    heads = [row["group"] for row in unseen]
    print(f"{len(seen)} photos to learn from, {len(unseen)} of {len(set(heads))} other heads to read; chance 0.250")
    for name in fit:
        began = time.monotonic()
        net = taught(fit[name], labels, options.epochs * (3 if name == "latents" else 1), seed=0)
        with torch.no_grad():
            read = torch.cat([net(part).argmax(dim=1) for part in new[name].split(64)])
        recalls = [float((read[truth == c] == c).float().mean()) for c in range(CLASSES) if (truth == c).any()]
        share, interval = metrics.mean_with_interval((read == truth).float().tolist(), heads, draws=1000, seed=0)
        print(
            f"{name:8} balanced accuracy {np.mean(recalls):.3f}, right {share:.3f} [{interval[0]:.3f}, {interval[1]:.3f}],"
            f" {time.monotonic() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
