"""Stage 1: is the training loop fast, and is the encoder right where simpler things are not?

    python benchmarks/stage1.py speed                                   images per second beside a plain PyTorch loop
    python benchmarks/stage1.py quality --config configs/demo.yaml      unseen heads, beside two baselines
    python benchmarks/stage1.py control --config configs/demo.yaml      trained on shuffled labels: it should be at chance

``quality`` reads the processed set and the finished Stage 1 of a configuration. All rivals are measured in the same run.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import v2

from backend import artifacts
from backend.config import Config, TextureConfig, load_config
from backend.demo import miniature
from backend.imaging.decode import write_png
from backend.training import keyed
from backend.training.models.supcon import UNKNOWN, supcon_loss
from backend.training.models.texture_encoder import load_texture_encoder, new_encoder
from backend.training.processes import Processes, join_processes
from backend.training.texture_data import BalancedSampler, PatchImages, PatchTable, feed, read_patch_tables
from backend.training.texture_metrics import Probabilities, embed, predict_probabilities, ridge_predict, score_split
from backend.training.texture_trainer import Trainer, labels_of
from backend.training.train_texture import RESULT, train_texture

PROBE_PATCHES = 1024
WARMUP = 2  # steps that are not timed


def print_surroundings(device: torch.device) -> None:
    """Says on what the figures were taken."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    print(f"device {device} ({name}), python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")


# ------------------------------------------------------------------------------------------------------------------------------ speed
def write_patches(folder: Path, count: int = 512, side: int = 128) -> PatchTable:
    """PNGs of smooth noise, which compress about as hair does, with labels and heads of all kinds."""
    rng = np.random.default_rng(0)
    (folder / "hair_patches").mkdir(parents=True)
    rows = []
    for number in range(count):
        coarse = torch.from_numpy(rng.random((1, 3, side // 4, side // 4))).float()
        image = (functional.interpolate(coarse, size=side, mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        name = f"hair_patches/{number:04d}.png"
        write_png(folder / name, image, compression=1)
        rows.append(
            {
                "id": str(number),
                "group": f"g{number % 64}",
                "split": "train",
                "curl": number % 4,
                "volume": (number // 4) % 3,
                "patches": [name],
            }
        )
    artifacts.write_jsonl(folder / "metadata.jsonl", rows)
    return read_patch_tables(folder)["train"]


class PlainDataset(Dataset[tuple[Tensor, Tensor, int, int, int]]):
    """The usual way: PIL and torchvision's transforms, once for each view."""

    def __init__(self, table: PatchTable, side: int) -> None:
        self.table = table
        self.transform = v2.Compose([
            v2.PILToTensor(), v2.RandomRotation(20), v2.RandomResizedCrop(side, scale=(0.56, 1.0), ratio=(1.0, 1.0), antialias=True), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int, int, int]:
        with Image.open(self.table.paths[number]) as picture:
            image = picture.convert("RGB")
        one, other = self.transform(image), self.transform(image)
        return one, other, int(self.table.curl[number]), int(self.table.volume[number]), int(self.table.group[number])


class PlainNet(nn.Module):
    """The same network without any of this project's code."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = ResNet(Bottleneck, list(layers))
        self.backbone.fc = nn.Identity()
        self.projection = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
        self.curl = nn.Sequential(nn.Dropout(0.2), nn.Linear(2048, 4))
        self.volume = nn.Sequential(nn.Dropout(0.2), nn.Linear(2048, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projection and the logits of both labels."""
        embedding = self.backbone(images)
        return functional.normalize(self.projection(embedding), dim=1), self.curl(embedding), self.volume(embedding)


def plain_steps(table: PatchTable, config: TextureConfig, device: torch.device) -> Iterator[float]:
    """Takes one step of a plain fp32 loop at a time; yields the seconds it waited for data."""
    net = PlainNet(config.layers).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    dataset = PlainDataset(table, config.image_size)
    endless = RandomSampler(dataset, replacement=True, num_samples=1_000_000)
    loader = DataLoader(
        dataset, batch_size=config.batch_size, sampler=endless, num_workers=config.workers, pin_memory=device.type == "cuda"
    )
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        one, other, curl, volume, group = next(batches)
        waited = time.perf_counter() - start
        curl, volume, group = (t.to(device).repeat(2) for t in (curl, volume, group))
        projection, curl_logits, volume_logits = net(torch.cat([one, other]).to(device))
        contrast = supcon_loss(projection, curl * 3 + volume, group, temperature=config.temperature)
        loss = functional.cross_entropy(curl_logits, curl) + functional.cross_entropy(volume_logits, volume) + 0.5 * contrast
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield waited


def our_steps(table: PatchTable, config: TextureConfig, device: torch.device) -> Iterator[float]:
    """The same with Stage 1's own loop; patches are decoded at every step, as they are when a set does not fit into memory."""
    trainer = Trainer(config, new_encoder(config.layers, dropout=config.dropout, seed=0), Processes(device))
    trainer.model.train()
    images = PatchImages(table, config.image_size, workers=config.workers, budget=0)
    batches = feed(
        images,
        BalancedSampler(table, batch_size=config.batch_size, seed=0),
        range(config.steps),
        slice(0, config.batch_size),
        workers=config.workers,
    )
    while True:
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        trainer.step(batch, labels_of(table, batch.patches))
        yield waited


def speed(arguments: argparse.Namespace) -> None:
    """Both loops in turn in one process, on the same patches."""
    device = join_processes(arguments.device).device
    print_surroundings(device)
    layers = [int(count) for count in arguments.layers.split(",")]
    settings = {"layers": layers, "image_size": arguments.size, "batch_size": arguments.batch, "workers": arguments.workers}
    config = TextureConfig.model_validate(settings)
    print(
        f"blocks {layers}, {arguments.size} px, {arguments.batch} patches = {2 * arguments.batch} views a step, {arguments.workers} workers"
    )
    with tempfile.TemporaryDirectory() as folder:
        table = write_patches(Path(folder))
        rivals = {"plain fp32 loop": plain_steps(table, config, device), "stage 1": our_steps(table, config, device)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
        for turn in range(arguments.steps + WARMUP):  # taken in turn, so that whatever else the machine does meets both
            for name, steps in rivals.items():
                start = time.perf_counter()
                waited = next(steps)
                if turn >= WARMUP:
                    taken[name].append((time.perf_counter() - start, waited))
    rates = {}
    for name, found in taken.items():
        rates[name] = 2 * arguments.batch / statistics.median(seconds for seconds, _ in found)
        print(
            f"{name:16s} {rates[name]:9.1f} views/s, waiting for data {100 * sum(w for _, w in found) / sum(s for s, _ in found):.1f} % of the time"
        )
    print(f"stage 1 is {rates['stage 1'] / rates['plain fp32 loop']:.2f} times as fast")


# ---------------------------------------------------------------------------------------------------------------------------- quality
def colour_histogram(images: PatchImages, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """8 x 8 x 8 bins of RGB, (N, 512)."""
    bins = images.get(numbers).astype(np.int64) // 32
    index = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).reshape(len(numbers), -1)
    return np.stack([np.bincount(row, minlength=512) / index.shape[1] for row in index])


def probe(features: Callable[[str, NDArray[np.int64]], NDArray[Any]], tables: dict[str, PatchTable], split: str) -> dict[str, Any]:
    """Scores of a linear probe on features, fitted on training patches whose labels are known."""
    fit, new = tables["train"].spread(PROBE_PATCHES), tables[split].spread(PROBE_PATCHES)
    x, x_new = features("train", fit), features(split, new)
    found = []
    for labels, classes in ((tables["train"].curl[fit], 4), (tables["train"].volume[fit], 3)):
        known = labels != UNKNOWN
        found.append(ridge_predict(x[known], np.eye(classes)[labels[known]], tables["train"].group[fit][known], x_new, seed=0))
    return score_split(Probabilities(*found), tables[split], new, seed=0)


def shuffled(config: Config, folder: Path, seed: int) -> Config:
    """The same set with the training heads' labels dealt out anew among them; val and test keep theirs."""
    (folder / "processed").mkdir(parents=True)
    for pictures in ("hair_patches", "style_vectors"):
        (folder / "processed" / pictures).symlink_to(config.paths.processed / pictures)
    rows = artifacts.read_jsonl(config.paths.processed / "metadata.jsonl")
    labels = {row["group"]: (row["curl"], row["volume"]) for row in rows if row["split"] == "train"}
    dealt = dict(
        zip(labels, [list(labels.values())[i] for i in keyed.numpy_generator(seed, "shuffle").permutation(len(labels))], strict=True)
    )
    for row in rows:
        if row["split"] == "train":
            row["curl"], row["volume"] = dealt[row["group"]]
    artifacts.write_jsonl(folder / "processed" / "metadata.jsonl", rows)
    return config.model_copy(update={"paths": config.paths.model_copy(update={"processed": folder / "processed"})})


def control(arguments: argparse.Namespace) -> None:
    """Does anything but the labels tell the class? Stage 1 from a ResNet that has seen no label, on the true labels and on shuffled ones.

    The shipped ResNet sorts heads by curl already: from there a shuffle predicts one class or another for all heads of a sort, which is far
    from chance either way. One shuffle is a single draw; hence several, and an interval over them.
    """
    config = load_config(arguments.config, arguments.overrides)
    texture = config.texture.model_copy(update={"steps": arguments.steps, "save_every": arguments.steps, "patience": 0})
    tables = read_patch_tables(config.paths.processed)
    images = {split: PatchImages(tables[split], texture.image_size, workers=2) for split in ("val", "test")}
    print(f"{arguments.steps} steps each, from untrained weights; balanced accuracy by photo; chance: curl 0.250, volume 0.333")
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        for number in range(arguments.shuffles + 1):
            folder = Path(work) / str(number)
            miniature.create("resnet", folder / "weights", seed=number)
            dealt = shuffled(config, folder, number) if number else config
            places = {"weights": folder / "weights", "checkpoints": folder / "checkpoints"}
            train_texture(dealt.model_copy(update={"texture": texture, "paths": dealt.paths.model_copy(update=places)}))
            encoder = load_texture_encoder(folder / "checkpoints" / RESULT)
            for split, seen in images.items():
                numbers = tables[split].spread(len(tables[split]))
                scores = score_split(predict_probabilities(encoder, seen, numbers), tables[split], numbers, seed=0)
                show(f"{split}: {'shuffle ' + str(number) if number else 'true labels'}", scores)
                for label in ("curl", "volume") if number else ():
                    found.setdefault((split, label), []).append(scores[label]["photo"]["balanced_accuracy"])
    for (split, label), values in found.items():
        mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
        reach = float(student.ppf(0.975, len(values) - 1)) * error
        print(
            f"{split}, {label}: mean of {len(values)} shuffles {mean:.3f}, 95 % interval over shuffles [{mean - reach:.3f}, {mean + reach:.3f}]"
        )


def show(name: str, scores: dict[str, Any]) -> None:
    """One line of the comparison."""
    cells = []
    for label in ("curl", "volume"):
        found = scores[label]["photo"]
        low, high = found["balanced_accuracy_ci"]
        cells.append(
            f"{label} {found['balanced_accuracy']:.3f} [{low:.3f}, {high:.3f}] (patch {scores[label]['patch']['balanced_accuracy']:.3f})"
        )
    print(f"{name:34s} {'   '.join(cells)}")


def quality(arguments: argparse.Namespace) -> None:
    """The finished encoder beside its rivals, on heads that none of them was fitted on."""
    config = load_config(arguments.config, arguments.overrides)
    print_surroundings(torch.device("cpu"))
    tables = read_patch_tables(config.paths.processed)
    images = {split: PatchImages(table, config.texture.image_size, workers=2) for split, table in tables.items()}
    trained = load_texture_encoder(config.paths.checkpoints / RESULT)
    untrained = new_encoder(config.texture.layers, dropout=0.0, seed=0).eval()
    heads = {split: len(table.group_names) for split, table in tables.items()}
    print(f"heads {heads}; balanced accuracy by photo with 95 % interval over heads; chance: curl 0.250, volume 0.333")
    for split in ("val", "test"):
        table = tables[split]
        if len(table):
            numbers = table.spread(len(table))
            print(f"-- {split}")
            show("stage 1", score_split(predict_probabilities(trained, images[split], numbers), table, numbers, seed=0))
            show("random encoder, linear probe", probe(lambda s, n: embed(untrained, images[s], n).pooled, tables, split))
            show("colour histogram, linear probe", probe(lambda s, n: colour_histogram(images[s], n), tables, split))
    found = artifacts.read_header(config.paths.checkpoints / RESULT)["metrics"]["colour_probe"]
    print(
        "colour by linear probe, mean CIEDE2000: "
        + ", ".join(
            f"{part} {found[part + '_delta_e']:.2f} (mean colour: {found[part + '_delta_e_of_mean']:.2f})" for part in ("pooled", "tokens")
        )
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    fast = verbs.add_parser("speed")
    fast.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    fast.add_argument("--layers", default="3,4,6,3")
    fast.add_argument("--size", type=int, default=128)
    fast.add_argument("--batch", type=int, default=16)
    fast.add_argument("--workers", type=int, default=1)
    fast.add_argument("--steps", type=int, default=10)
    fast.set_defaults(run=speed)
    good = verbs.add_parser("quality")
    good.add_argument("--config", default=None)
    good.add_argument("overrides", nargs="*")
    good.set_defaults(run=quality)
    blind = verbs.add_parser("control")
    blind.add_argument("--config", default=None)
    blind.add_argument("--steps", type=int, default=600)
    blind.add_argument("--shuffles", type=int, default=6)
    blind.add_argument("overrides", nargs="*")
    blind.set_defaults(run=control)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
