"""What the noisiest latents still tell: a linear probe reads the hair's mean colour from latents at t = 999, on heads it has not seen.

    python benchmarks/schedule_leak.py --config configs/miniature.yaml

In training the latents at t = 999 are the hair's own under noise, in sampling they are noise alone: what the probe reads here, a network
can learn to lean on, and misses when it paints. Compared are SDXL's own schedule, the same with noise offset (train.noise_offset), and
the same rescaled to zero terminal SNR (arXiv 2305.08891). Needs the processed set of that configuration and its autoencoder.

The probe (ridge, its penalty chosen on the training heads) sees each channel's mean over 4 x 4 parts of the latents. Latents of a real
photo have 64 times as many cells as the miniature's, and noise averages out over them: the second column draws the noise of such means
as 128 x 128 latents have it. Figures are CIEDE2000 errors with 95 % bootstrap intervals over heads; a probe that reads nothing guesses
the mean colour.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from backend.config import load_config
from backend.training import metrics
from backend.training.keyed import numpy_generator
from backend.training.models.schedule import NoiseSchedule
from backend.training.prepared import Prepared
from backend.tryon import conditioning
from benchmarks.stage2_parts import SCHEDULER

LAST = 999
PARTS = 4  # the latents are pooled to PARTS x PARTS
DRAWS = 8  # noisy versions of each training photo
SCHEDULES: dict[str, tuple[dict[str, Any], float]] = {  # changes to SDXL's schedule, noise offset
    "SDXL's own": ({}, 0.0),
    "noise offset 0.0357": ({}, 0.0357),
    "noise offset 0.1": ({}, 0.1),
    "zero terminal SNR": ({"rescale_betas_zero_snr": True}, 0.0),
}
Array = NDArray[np.float64]


@torch.no_grad()
def latents_and_colours(prepared: Prepared, rows: list[dict[str, Any]], vae: Any) -> tuple[Array, Array]:
    """Pooled clean latents (N, 4 * PARTS^2) and the hair's mean Lab (N, 3) of the photos."""
    pooled, colours = [], []
    for start in range(0, len(rows), 32):
        samples = [prepared.sample(row) for row in rows[start : start + 32]]
        mean, _ = conditioning.encode_latents(vae, conditioning.to_tensor([one.photo for one in samples]))
        pooled.append(torch.nn.functional.adaptive_avg_pool2d(mean.float(), PARTS).flatten(1).numpy())
        colours += [metrics.hair_colour(one.photo, one.hair) for one in samples]
    return np.concatenate(pooled).astype(np.float64), np.stack(colours).astype(np.float64)


def noised(clean: Array, alpha: float, offset: float, cells: int, rng: np.random.Generator) -> Array:
    """Pooled latents under the schedule's noise. cells: latent cells in a part, over which independent noise averages to 1/sqrt(cells).

    The offset is one number per sample and channel (as ``stage2_data`` draws it), which no averaging removes.
    """
    parts = PARTS * PARTS
    noise = rng.standard_normal(clean.shape) / np.sqrt(cells)
    if offset:
        noise += offset * np.repeat(rng.standard_normal((len(clean), clean.shape[1] // parts)), parts, axis=1)
    return np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise


def read(clean: tuple[Array, Array], colours: tuple[Array, Array], alpha: float, offset: float, cells: int) -> list[float]:
    """CIEDE2000 of each held-out photo's colour as the probe reads it; the pairs are (training heads, others)."""
    rng = numpy_generator(0, "schedule leak", cells)
    seen = np.concatenate([noised(clean[0], alpha, offset, cells, rng) for _ in range(DRAWS)])
    scale = seen.std()
    probe = RidgeCV(alphas=np.logspace(-1, 6, 15)).fit(seen / scale, np.tile(colours[0], (DRAWS, 1)))
    guess = probe.predict(noised(clean[1], alpha, offset, cells, rng) / scale)
    return [metrics.ciede2000(one, other) for one, other in zip(guess, colours[1], strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, for example paths.processed=FOLDER")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    prepared = Prepared(config.paths.processed)
    vae = conditioning.load_vae(conditioning.inpainting_folder(config.paths.weights), device=torch.device("cpu"), dtype=torch.float32)
    rows = prepared.rows()
    groups = sorted({row["group"] for row in rows})
    held = {groups[n] for n in numpy_generator(0, "schedule leak heads").permutation(len(groups))[: len(groups) // 3]}
    halves = [[row for row in rows if (row["group"] in held) == other] for other in (False, True)]
    (fit, fit_colours), (new, new_colours) = (latents_and_colours(prepared, part, vae) for part in halves)
    heads = [row["group"] for row in halves[1]]
    print(f"{len(fit)} photos to learn from, {len(new)} of {len(held)} other heads; CIEDE2000 of the hair's mean colour")

    def shown(errors: list[float]) -> str:
        mean, (low, high) = metrics.mean_with_interval(errors, heads, draws=2000, seed=0)
        return f"{mean:5.1f} [{low:.1f}, {high:.1f}]"

    print("guessing the mean colour      " + shown([metrics.ciede2000(fit_colours.mean(axis=0), colour) for colour in new_colours]))
    print("clean latents                 " + shown(read((fit, new), (fit_colours, new_colours), 1.0, 0.0, 1)))
    small = (config.data.resolution // 8 // PARTS) ** 2
    for name, (changes, offset) in SCHEDULES.items():
        alpha = float(NoiseSchedule({**SCHEDULER, **changes}).alpha(torch.tensor([LAST]))[0])
        columns = [shown(read((fit, new), (fit_colours, new_colours), alpha, offset, cells)) for cells in (small, (128 // PARTS) ** 2)]
        print(f"{name:20} signal {alpha**0.5:.3f}  {columns[0]:22} as 128 x 128 latents {columns[1]}")


if __name__ == "__main__":
    main()
