"""The model card: what a bundle is, what it was trained on, what was measured, what it cannot do, and under which licences."""

from __future__ import annotations

from typing import Any

from backend.training.figures import FIGURES

_DATA = (
    "K-Hairstyle (Kim et al., ICIP 2021, arXiv 2102.06288): Korean hairstyle photos with polygons and attributes by stylists, for research. "
    "The faces of the released photos are smoothed away, so next to nothing is learnt about how hair meets a face. Photos of one head lie "
    "in one split; in the authors' own split they do not."
)
_LIMITS = (
    "- Skin tones, ages, hair types and photo styles that K-Hairstyle does not hold are not covered by any figure here.\n"
    "- Coverings, glasses over hair, several heads close together and views from the side or behind are outside what it was measured on.\n"
    "- It shows how a hairstyle may look; it is no measurement of a person, and pictures of people are to be made with their consent.\n"
    "- The UNet alone, without the injector and the texture encoder, does not follow a reference photo."
)


def model_card(header: dict[str, Any]) -> str:
    """The card as Markdown, from a bundle's header alone, so that it never says more than the file itself."""
    gate, figures = header["gate"], header["metrics"]
    parts = [
        f"# {header.get('name', 'DeepHair')}",
        "A hair-transfer model: a fine-tuned 9-channel SDXL inpainting UNet with style and identity tokens, and its hair texture encoder.",
        _note(header),
        "## Verdict",
        _verdict(gate),
        "## Data",
        f"{_DATA}\n\nPrepared data: sha256 `{header.get('data_digest', 'unknown')}`; heads of the evaluation were never trained on.",
        "## Figures",
        f"{figures.get('samples', 0)} transfer and {figures.get('samples_reconstruction', 0)} reconstruction pairs of {figures.get('heads', 0)} "
        f"heads at {figures.get('picture_side', header['resolution'])} px; means with 95 % bootstrap intervals over heads. "
        f"LPIPS backbone: {figures.get('lpips_backbone', 'unknown')}.",
        _table(figures),
        "## Limits",
        _LIMITS,
        "## Licences",
        "\n".join(f"- {name}: {licence}" for name, licence in sorted(header.get("licences", {}).items())),
        "## Origin",
        f"{_over(header)}`{header['base'].get('name', '')}`, sha256 `{header['base'].get('sha256', '')}`. Step {header.get('step', 'unknown')}, "
        f"{header['resolution']} px, identity model {header['identity_model']}. Configuration `{header.get('config_digest', '')}`, "
        f"commit `{header.get('git_commit', 'unknown')}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _over(header: dict[str, Any]) -> str:
    if "lora" not in header:
        return "Base "
    return f"The file holds a LoRA of rank {header['lora']['rank']} and works over this base alone: "


def _note(header: dict[str, Any]) -> str:
    if not header.get("miniature"):
        return ""
    return "**Trained from miniature weights on rendered people: it shows that the code and the method work, and makes no photos.**"


def _verdict(gate: dict[str, Any]) -> str:
    lines = [f"Decided by the profile `{gate.get('profile', 'none')}`: " + ("passed." if gate.get("passed") else "not passed.")]
    if gate.get("forced"):
        lines.append(f"**Deployed by force**: {gate['force_reason']}")
    for profile in ("design", "evidence"):
        verdict = gate.get(profile, {})
        lines += [f"- {profile}: {reason}" for reason in (*verdict.get("reasons", ()), *verdict.get("notes", ()))]
    return "\n".join(lines)


def _table(figures: dict[str, Any]) -> str:
    rows = ["| figure | value | 95 % interval |", "|---|---|---|"]
    for figure in FIGURES:
        if figure.name in figures:
            low, high = figures.get(f"{figure.name}_ci", (None, None))
            interval = f"{low:.3f} to {high:.3f}" if low is not None else "none: a figure of the whole set"
            rows.append(f"| {figure.title} ({figure.protocol}) | {figures[figure.name]:.3f} | {interval} |")
    absent = [f"- left out: {name} ({reason})" for name, reason in sorted(figures.get("absent", {}).items())]
    return "\n".join(rows) + ("\n\n" + "\n".join(absent) if absent else "")
