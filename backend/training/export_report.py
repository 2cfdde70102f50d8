"""The page that says whether a model is good: verdict first, then figures with baselines, then pictures (DESIGN 4.5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.config import Config
from backend.imaging.decode import write_png
from backend.training import html
from backend.training.evaluate import BASELINES, HOLD_THE_TRUTH, Evaluation, Result
from backend.training.figures import BY_NAME, FIGURES, Figure
from backend.training.stage2_files import log_rows

_TITLES = {
    "no_op": "unchanged photo", "bald": "bald image", "crop_paste": "crop and paste", "colour_transfer": "colour transfer",
    "shuffled_reference": "shuffled reference", "no_conditioning": "no conditioning", "deployed": "deployed before",
    "ceiling_vae": "VAE alone", "ceiling_reference": "reference itself",
}  # fmt: skip
_PLACES = (("figures", "Figures"), ("transfer", "Transfer"), ("reconstruction", "Reconstruction"), ("worst", "The worst results"),
           ("slices", "Slices"), ("made", "How it was made"))  # fmt: skip
_SLICED = {"transfer": ("hair_color_delta_e", "curl_agreement", "identity_kept"), "reconstruction": ("lpips", "masked_psnr", "ssim")}


def write(config: Config, summary: dict[str, Any], evaluation: Evaluation) -> None:
    """Writes ``index.html`` (one file, nothing loaded from outside) and ``pictures.png`` into ``paths.report``."""
    figures = summary["evaluation"]
    parts = [
        _verdict(summary),
        _headline(figures),
        _weights(summary),
        _links(),
        html.contents(_PLACES),
        _heading("figures"),
        _legend(figures),
        *(_table(figures, protocol) for protocol in ("transfer", "preservation", "reconstruction")),
        _absent(figures),
        _published(figures),
        _heading("transfer", ": another person's hair"),
        "<p>The prompt says nothing of hair; only the reference photo speaks.</p>",
        *map(_row, evaluation.transfer.first),
        _heading("reconstruction", ": the same head from another view"),
        "<p>The target's own photo is the truth.</p>",
        *map(_row, evaluation.reconstruction.first),
        _heading("worst"),
        "<p>Those furthest from the reference's colour, then those furthest from the truth by LPIPS.</p>",
        *(_row(result, figure=kept.figure) for kept in (evaluation.transfer, evaluation.reconstruction) for result in kept.worst),
        *_failed(evaluation.transfer.failed),
        _heading("slices"),
        "<p>What small groups show can be chance: look at the counts and the intervals.</p>",
        *(_slices(figures, kind) for kind in _SLICED),
        _heading("made"),
        _stages(summary["stages"]),
        *_curves(config),
        html.details("environment", json.dumps(summary["environment"], indent=2)),
        html.details("configuration", json.dumps(config.resolved(), indent=2)),
    ]
    page = html.page("DeepHair: evaluation", parts, lead=f"Configuration {config.name}, checkpoint {summary['checkpoint']}.")
    artifacts.write_text(config.paths.report / "index.html", page)
    write_png(config.paths.report / "pictures.png", picture_sheet(evaluation.transfer.first[:6]))


def picture_sheet(results: Sequence[Result]) -> NDArray[np.uint8]:
    """Rows of target, reference, bald, result as one picture (rows * S, 4 * S, 3) uint8 RGB."""
    scenes = [(r.scene.target.photo, r.scene.reference.photo, r.scene.head.bald, r.view.picture) for r in results]
    return np.vstack([np.hstack(pictures) for pictures in scenes])


# ---- words ----


def _heading(place: str, more: str = "") -> str:
    return f'<h2 id="{place}">{escape(dict(_PLACES)[place] + more)}</h2>'


def _headline(figures: dict[str, Any]) -> str:
    """What everybody asks first: is it the reference's colour and curl, is it near the truth, and is the rest left alone."""
    held = {**figures["baselines"], **{name: figures[name] for name in ("ceiling_vae", "ceiling_reference")}}
    wanted = (
        ("hair_color_delta_e", "hair colour off the reference's (CIEDE2000)", ("no_op", "shuffled_reference")),
        ("curl_agreement", "of the results curl as their reference", ("shuffled_reference", "ceiling_reference")),
        ("lpips", "LPIPS to the truth", ("bald", "ceiling_vae")),
        ("identity_kept", f"of {figures['identity_samples']} intact faces are recognised as their person", ("bald",)),
    )
    shown = [
        (
            _value(figures, name),
            what,
            ", ".join(f"{_TITLES[other]} {_value(held[other], name)}" for other in against if name in held[other]),
        )
        for name, what, against in wanted
        if name in figures
    ]
    return html.tiles([*shown, (str(figures["outside_max_abs_diff"]), "largest change of any byte outside the mask", "0 is wanted")])


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
    for profile in sorted(("design", "evidence"), key=lambda name: name != gate["profile"]):  # the one that decides comes first
        verdict = gate[profile]
        mark = '<span class="good">passed</span>' if verdict["passed"] else '<span class="bad">not passed</span>'
        reasons = "".join(f"<li>{escape(text)}</li>" for text in verdict["reasons"])
        notes = "".join(f"<li>noted: {escape(text)}</li>" for text in verdict["notes"])
        role = "" if profile == gate["profile"] else " (decides nothing here)"
        lines.append(f"<p>Profile {profile}{role}: {mark}</p>" + (f"<ul>{reasons}{notes}</ul>" if reasons or notes else ""))
    return f'<div class="verdict {kind}">{"".join(lines)}</div>'


def _weights(summary: dict[str, Any]) -> str:
    used = summary["environment"]["weights"]
    note = ""
    if any(text.startswith("miniature") for text in used.values()):
        note = "<p><strong>Miniature weights were used: these figures speak of the code and the method, not of photo quality.</strong></p>"
    return note + html.details("pretrained parts", "\n".join(f"{name}: {text}" for name, text in sorted(used.items())))


def _links() -> str:
    names = {"summary.json": "summary", "samples.json": "every pair's figures", "pairs.json": "the pairs", "config.json": "configuration"}
    return '<p class="soft">As JSON: ' + ", ".join(f'<a href="{file}">{name}</a>' for file, name in names.items()) + "</p>"


def _legend(figures: dict[str, Any]) -> str:
    text = (
        f"Means with 95 % bootstrap intervals over {figures['heads']} heads of the {figures['split']} split, {figures['samples']} transfer and "
        f"{figures['samples_reconstruction']} reconstruction pairs at {figures['picture_side']} px; LPIPS backbone: {figures['lpips_backbone']}. "
        f"{figures['protocol']}. Arrows say which way is better."
    )
    return f'<p class="soft">{escape(text)}</p>'


def _absent(figures: dict[str, Any]) -> str:
    if not figures["absent"]:
        return ""
    listed = "".join(
        f"<li>{escape(BY_NAME[name].title)}: {escape(reason)}</li>" for name, reason in sorted(figures["absent"].items()) if name in BY_NAME
    )
    return f"<p>Left out:</p><ul>{listed}</ul>"


def _published(figures: dict[str, Any]) -> str:
    published = figures.get("published")
    if not published:
        return ""
    names = [name for name in published if name in BY_NAME]
    rows = [[BY_NAME[name].title, _shown(figures, name), f"{published[name]:g}"] for name in names]
    why = published["not_comparable"]
    short = f"Not comparable: {'; '.join(why)}. " if why else ""
    return f"<h3>Beside published figures</h3>{html.table(['figure', 'ours', 'published'], rows)}<p class='soft'>{escape(short + published['source'])}</p>"


# ---- tables ----


def _table(figures: dict[str, Any], protocol: str) -> str:
    """One protocol's table: a row per method, a column per figure that was measured."""
    wanted = [figure for figure in FIGURES if figure.protocol == protocol and figure.name in figures]
    methods = {"ours": figures, **{name: figures["baselines"][name] for name in BASELINES}}
    methods |= {name: figures[name] for name in ("deployed", "ceiling_vae", "ceiling_reference") if name in figures}
    rows = []
    for name, values in methods.items():
        if any(figure.name in values for figure in wanted):
            mark = " (holds the truth)" if protocol == "reconstruction" and name in HOLD_THE_TRUTH else ""
            rows.append([_TITLES.get(name, name) + mark, *(_shown(values, figure.name) for figure in wanted)])
    note = f'<p class="soft">Largest change outside the mask, which must be 0: {figures["outside_max_abs_diff"]}.</p>'
    titles = [f"{figure.title}\u00a0{_arrow(figure)}" for figure in wanted]
    return f"<h3>{protocol.capitalize()}</h3>{html.table(['method', *titles], rows, label=protocol, first=True)}{note if protocol == 'preservation' else ''}"


def _arrow(figure: Figure) -> str:
    return "↑" if figure.better > 0 else "↓"


def _value(values: dict[str, Any], name: str) -> str:
    return format(values[name], BY_NAME[name].form)


def _shown(values: dict[str, Any], name: str) -> html.Measured | str:
    if name not in values:
        return ""
    interval, form = values.get(f"{name}_ci"), BY_NAME[name].form
    beside = f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""
    counted = f" n {values[f'{name}_n']}" if f"{name}_n" in values else ""
    return html.Measured(_value(values, name), beside + counted)


def _slices(figures: dict[str, Any], kind: str) -> str:
    names = [name for name in _SLICED[kind] if name in figures]
    rows = [
        [f"{slice_name}: {value}", found["pairs"], found["heads"], *(_shown(found, name) for name in names)]
        for slice_name, values in figures["slices"][kind].items()
        for value, found in values.items()
    ]
    columns = [f"{kind} slice", "pairs", "heads", *(BY_NAME[name].title for name in names)]
    return html.folded(f"{kind}: by {', '.join(figures['slices'][kind])}", html.table(columns, rows))


def _stages(stages: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            *(_text(values.get("seconds")),),
            ", ".join(f"{k.replace('_', ' ')} {_text(v)}" for k, v in values.items() if k != "seconds"),
        ]
        for name, values in stages.items()
    ]
    return html.table(["stage", "seconds", "what it says"], rows, numeric=False)


def _text(value: object) -> str:
    return "not run here" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- pictures ----


def _row(result: Result, *, figure: str = "") -> str:
    scene, view = result.scene, result.view
    values = result.record.values["ours"]
    said = f" ({BY_NAME[figure].title} {_value(values, figure)})" if figure else ""
    if values.get("failure_rate"):
        said += f", failed: {view.failed or 'no face is found in it'}"
    mask = np.zeros_like(view.hair) if view.mask is None else (view.mask * 255).round().astype(np.uint8)
    pictures = [
        html.picture(scene.target.photo, f"target {scene.target.id}"),
        html.picture(scene.reference.photo, f"reference {scene.reference.id}"),
        html.picture(mask, "what was changed"),
        html.picture(scene.head.bald, "hair taken out"),
        html.picture(view.picture, f"result{said}"),
    ]
    if "lpips" in values:  # reconstruction: beside the result once more, where the eye compares
        pictures.append(html.picture(scene.target.photo, "truth"))
    return html.row(pictures)


def _failed(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    return ["<p>Results that failed: no picture, or no face that the detector finds.</p>", *map(_row, results)]


def _curves(config: Config) -> list[str]:
    """The losses of the run over its steps."""
    rows = log_rows(config)
    wanted = {
        "loss": "training loss",
        "validation_loss": "validation loss: fixed photos, timesteps and noise, heads never trained on",
    }
    return [html.curve(title, [(row["step"], row[key]) for row in rows if key in row]) for key, title in wanted.items()]
