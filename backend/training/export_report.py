"""The page that says whether a model is good: verdict first, then figures with baselines, then pictures (DESIGN 4.5)."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.config import Config
from backend.imaging.decode import write_png
from backend.training import html
from backend.training.evaluate import Evaluation, Result
from backend.training.stage2_files import log_rows


def write(config: Config, summary: dict[str, Any], evaluation: Evaluation) -> None:
    """Writes ``index.html`` (one file, nothing loaded from outside) and ``pictures.png`` into ``paths.report``."""
    shown = config.evaluate.pictures
    parts = [
        _verdict(summary),
        _weights(summary),
        "<h2>Figures</h2>",
        _figures(summary["evaluation"]),
        "<h2>Transfer: another person's hair</h2><p>The prompt says nothing of hair; only the reference photo speaks.</p>",
        *(_row(result, "result") for result in evaluation.transfer[:shown]),
        "<h2>Reconstruction: the same head from another view</h2><p>Here the target's own photo is the truth.</p>",
        *(_row(result, "result") for result in evaluation.reconstruction[:shown]),
        "<h2>How it was made</h2>",
        _stages(summary["stages"]),
        _curve(config),
        html.details("environment", json.dumps(summary["environment"], indent=2)),
        html.details("configuration", json.dumps(config.resolved(), indent=2)),
    ]
    page = html.page("DeepHair: evaluation", parts, lead=f"Configuration {config.name}, checkpoint {summary['checkpoint']}.")
    artifacts.write_text(config.paths.report / "index.html", page)
    write_png(config.paths.report / "pictures.png", picture_sheet(evaluation.transfer[: min(shown, 6)]))


def picture_sheet(results: list[Result]) -> NDArray[np.uint8]:
    """Rows of target, reference, bald, result as one picture (rows * S, 4 * S, 3) uint8 RGB."""
    return np.vstack([np.hstack([r.target.photo, r.reference.photo, r.head.bald, r.picture]) for r in results])


def _verdict(summary: dict[str, Any]) -> str:
    gate = summary["gate"]
    kind = "good" if gate["passed"] else "bad"
    if gate["passed"]:
        lead = "Passed and deployed."
    elif gate["forced"]:
        lead = f"Not passed; deployed by force: {gate['force_reason']}"
    else:
        lead = "Not passed; not deployed. What was deployed before stays."
    lines = [f"<p><strong>{escape(lead)}</strong> The profile <em>{gate['profile']}</em> decides.</p>"]
    for profile in ("design", "evidence"):
        verdict = gate[profile]
        mark = '<span class="good">passed</span>' if verdict["passed"] else '<span class="bad">not passed</span>'
        reasons = "".join(f"<li>{escape(text)}</li>" for text in (*verdict["reasons"], *verdict["notes"]))
        lines.append(f"<p>Profile {profile}: {mark}</p>" + (f"<ul>{reasons}</ul>" if reasons else ""))
    return f'<div class="verdict {kind}">{"".join(lines)}</div>'


def _weights(summary: dict[str, Any]) -> str:
    used = summary["environment"]["weights"]
    note = ""
    if any(text.startswith("miniature") for text in used.values()):
        note = "<p><strong>Miniature weights were used: these figures speak of the code and the method, not of photo quality.</strong></p>"
    return note + html.details("pretrained parts", "\n".join(f"{name}: {text}" for name, text in sorted(used.items())))


def _figures(figures: dict[str, Any]) -> str:
    base = figures["baselines"]
    n, pairs = figures["samples_reconstruction"], figures["samples"]
    bald, nothing, ceiling = base["bald"], base["no_conditioning"], figures["ceiling_vae"]
    rows = [
        [what, _shown(figures, name), f"bald image {_shown(bald, name)}", f"no conditioning {_shown(nothing, name)}",
         f"VAE alone {_shown(ceiling, name)}", n]
        for what, name in (("LPIPS, reconstruction (lower is better)", "lpips"), ("PSNR in the hair, reconstruction, dB (higher)", "masked_psnr"))
    ]  # fmt: skip
    transfer = [("hair colour difference, transfer, CIEDE2000 (lower)", "hair_color_delta_e")]
    transfer += [("curl class as in the reference, transfer (higher)", "curl_agreement")] if "curl_agreement" in figures else []
    for what, name in transfer:
        at_best = f"reference photo after the VAE {_shown(figures['ceiling_vae'], name)}"
        if name in figures["ceiling_reference"]:
            at_best += f", itself {_shown(figures['ceiling_reference'], name)}"
        no_op, shuffled = (
            f"{text} {_shown(base[key], name)}"
            for key, text in (("no_op", "unchanged photo"), ("shuffled_reference", "shuffled reference"))
        )
        rows.append([what, _shown(figures, name), no_op, shuffled, at_best, pairs])
    if "identity_kept" in figures:
        people = f"different people, 95th percentile {figures['identity_different_people_p95']:.3f}"
        rows.append(
            [
                "identity similarity of target and result",
                _shown(figures, "identity_similarity"),
                people,
                "",
                "",
                figures["identity_samples"],
            ]
        )
        rows.append(["results above that percentile", _shown(figures, "identity_kept"), "", "", "", figures["identity_samples"]])
    rows.append(["largest change outside the mask (must be 0)", figures["outside_max_abs_diff"], "", "", "", pairs + n])
    table = html.table(["figure", "ours", "baseline", "second baseline", "at best", "samples"], rows)
    note = (
        f"Means with 95 % bootstrap intervals over {figures['heads']} heads of the {figures['split']} split; "
        f"LPIPS backbone: {figures['lpips_backbone']}. {figures['protocol']}."
    )
    return f'{table}<p class="soft">{escape(note)}</p>'


def _shown(values: dict[str, Any], name: str) -> str:
    low, high = values[f"{name}_ci"]
    return f"{values[name]:.3f} [{low:.3f}, {high:.3f}]"


def _row(result: Result, title: str) -> str:
    mask = (result.mask * 255).round().astype(np.uint8)
    pictures = [
        html.picture(result.target.photo, f"target {result.target.id}"),
        html.picture(result.reference.photo, f"reference {result.reference.id}"),
        html.picture(mask, "what may change"),
        html.picture(result.head.bald, "hair taken out"),
        html.picture(result.picture, title),
    ]
    return html.row(pictures)


def _stages(stages: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, *(_text(values.get("seconds")),), ", ".join(f"{k} {_text(v)}" for k, v in values.items() if k != "seconds")]
        for name, values in stages.items()
    ]
    return html.table(["stage", "seconds", "what it says"], rows, numeric=False)


def _text(value: object) -> str:
    return "not run here" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _curve(config: Config) -> str:
    """The validation loss over the run as a small drawing."""
    points = [(row["step"], row["validation_loss"]) for row in log_rows(config) if "validation_loss" in row]
    if len(points) < 2:
        return ""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    span, last = (high - low) or 1.0, steps[-1] or 1
    line = " ".join(f"{20 + 560 * step / last:.1f},{20 + 120 * (high - value) / span:.1f}" for step, value in points)
    return (
        '<figure><svg viewBox="0 0 600 170" width="600" role="img" aria-label="validation loss over training steps" style="max-width:100%">'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="2"/>'
        f'<text x="20" y="14" font-size="12" fill="currentColor">{high:.4f}</text><text x="20" y="160" font-size="12" fill="currentColor">{low:.4f}</text>'
        f'<text x="580" y="160" font-size="12" text-anchor="end" fill="currentColor">step {last}</text></svg>'
        "<figcaption>validation loss: fixed photos, timesteps and noise, heads never trained on</figcaption></figure>"
    )
