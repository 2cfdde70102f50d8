"""The only way into production: two verdicts on the same figures, one of which decides (DESIGN section 7; issue texts of Stage 3)."""

from __future__ import annotations

from typing import Any

from backend.config import GateConfig

Interval = list[float]
IDENTITY_KEPT = 0.95  # wanted share of results whose identity network says "the same person"; less is noted
IDENTITY_LOST = 0.5  # a share that is below this beyond chance closes the gate


def decide(evaluation: dict[str, Any], settings: GateConfig) -> dict[str, Any]:
    """The ``gate`` object of summary.json: both profiles with every reason, the one that decides, and whether a failure was forced."""
    profiles = {"design": _verdict(_design(evaluation, settings)), "evidence": _verdict(*_evidence(evaluation))}
    passed = bool(profiles[settings.profile]["passed"])
    forced = not passed and bool(settings.force)
    return {
        "profile": settings.profile,
        "passed": passed,
        "forced": forced,
        "force_reason": settings.force if forced else "",
        **profiles,
        "thresholds": {"lpips_max": settings.lpips_max, "psnr_min": settings.psnr_min, "outside_max_abs_diff": 0},
    }


def _verdict(reasons: list[str], notes: list[str] | None = None) -> dict[str, Any]:
    return {"passed": not reasons, "reasons": reasons, "notes": notes or []}


def _design(figures: dict[str, Any], settings: GateConfig) -> list[str]:
    """The original document's thresholds, on paired reconstruction."""
    reasons = []
    if not figures["lpips"] <= settings.lpips_max:
        reasons.append(f"LPIPS {figures['lpips']:.3f} is above {settings.lpips_max:.2f}")
    if not figures["masked_psnr"] >= settings.psnr_min:
        reasons.append(f"masked PSNR {figures['masked_psnr']:.2f} dB is below {settings.psnr_min:.1f} dB")
    return reasons


def _evidence(figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Exact preservation, and better than every baseline beyond chance: reasons against, and notes on what was not judged.

    Transfer: the 95 % intervals lie apart. Reconstruction: results and baselines are of the same photos, so the interval of the gain,
    photo by photo, lies above zero. Curl is judged where it can be: where Stage 1 reads it from the reference photo itself after the VAE.
    """
    reasons, notes = [], []
    if figures["outside_max_abs_diff"] != 0:
        reasons.append(f"pixels outside the mask changed by up to {figures['outside_max_abs_diff']}")
    for name in ("no_op", "shuffled_reference"):
        reasons += _not_below(
            figures, figures["baselines"][name], "hair_color_delta_e", f"hair colour difference (CIEDE2000) against {name}"
        )
    if "curl_agreement" in figures:
        shuffled, ceiling = figures["baselines"]["shuffled_reference"], figures["ceiling_vae"]
        if _not_below(shuffled, ceiling, "curl_agreement", ""):
            notes.append(
                f"curl was not judged: after the VAE alone Stage 1 reads the class of {ceiling['curl_agreement']:.0%} of the reference photos, "
                f"no better than that of results for another reference ({shuffled['curl_agreement']:.0%}); ours {figures['curl_agreement']:.0%}"
            )
        else:
            reasons += _not_below(shuffled, figures, "curl_agreement", "curl agreement: the shuffled reference's against ours")
    for name in ("bald", "no_conditioning"):
        for gain, what in (("lpips_gain", "LPIPS"), ("masked_psnr_gain", "PSNR in the hair")):
            reasons += _no_gain(figures["baselines"][name], gain, f"reconstruction {what} against {name}")
    if figures.get("identity_kept", 1.0) < IDENTITY_KEPT:
        (reasons if figures["identity_kept_ci"][1] < IDENTITY_LOST else notes).append(
            f"{figures['identity_kept']:.1%} of the results are recognised as their person, {IDENTITY_KEPT:.0%} are wanted "
            f"(similarity above {figures['identity_different_people_p95']:.3f}, the 95th percentile of different people)"
        )
    return reasons, notes


def _no_gain(baseline: dict[str, Any], name: str, what: str) -> list[str]:
    low, high = baseline[f"{name}_ci"]
    if low > 0:
        return []
    return [f"{what}: the gain {baseline[name]:.3f} [{low:.3f}, {high:.3f}] is not clearly above 0"]


def _not_below(lower: dict[str, Any], upper: dict[str, Any], name: str, what: str) -> list[str]:
    ours, theirs = lower[f"{name}_ci"], upper[f"{name}_ci"]
    if ours[1] < theirs[0]:
        return []
    return [
        f"{what}: {lower[name]:.3f} [{ours[0]:.3f}, {ours[1]:.3f}] is not clearly below {upper[name]:.3f} [{theirs[0]:.3f}, {theirs[1]:.3f}]"
    ]
