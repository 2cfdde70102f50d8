"""The only way into production: two verdicts on the same figures, one of which decides (DESIGN section 7; docs/evaluation.md)."""

from __future__ import annotations

from typing import Any

from backend.config import GateConfig

IDENTITY_KEPT = 0.95  # wanted share of results whose identity network says "the same person"; less is noted
MIN_HEADS = 6  # 2 ** -heads, the chance that all heads agree by luck, is above the 2.5 % of an interval's end with fewer
IDENTITY_LOST = 0.5  # a share that is below this beyond chance closes the gate
_NAMES = {"lpips": "LPIPS", "masked_psnr": "PSNR in the hair", "hair_color_delta_e": "hair colour difference (CIEDE2000)",
          "hair_length_error": "hair length error (face heights)"}  # fmt: skip


def decide(evaluation: dict[str, Any], settings: GateConfig) -> dict[str, Any]:
    """The ``gate`` object of summary.json: both profiles with every reason, the one that decides, and whether a failure was forced."""
    worse = _worse_than_deployed(evaluation, settings)
    reasons, notes = _evidence(evaluation, settings)
    skipped = (
        [f"not compared with what is deployed: {evaluation['deployed_not_compared']}"] if "deployed_not_compared" in evaluation else []
    )
    profiles = {
        "design": _verdict(_design(evaluation, settings) + worse, skipped),
        "evidence": _verdict(reasons + worse, notes + skipped),
    }
    passed = bool(profiles[settings.profile]["passed"])
    forced = not passed and bool(settings.force)
    thresholds = {"lpips_max": settings.lpips_max, "psnr_min": settings.psnr_min, "outside_max_abs_diff": 0}
    thresholds |= {name: getattr(settings, name) for name in ("failure_max", "ceiling_share", "worse_lpips", "worse_psnr", "worse_color")}
    return {
        "profile": settings.profile,
        "passed": passed,
        "forced": forced,
        "force_reason": settings.force if forced else "",
        **profiles,
        "thresholds": thresholds,
    }


def _verdict(reasons: list[str], notes: list[str]) -> dict[str, Any]:
    return {"passed": not reasons, "reasons": reasons, "notes": notes}


def _worse_than_deployed(figures: dict[str, Any], settings: GateConfig) -> list[str]:
    """What is worse than in the model that is in production, on the same pairs, by more than the tolerance; for both profiles."""
    theirs = figures.get("deployed")
    if theirs is None:
        return []
    allowed = {"lpips": settings.worse_lpips, "masked_psnr": settings.worse_psnr, "hair_color_delta_e": settings.worse_color}
    return [
        f"{_NAMES[name]} is worse than the deployed model's by {-theirs[f'{name}_gain']:.3f}: {figures[name]:.3f} against "
        f"{theirs[name]:.3f}; {tolerance:g} is let pass"
        for name, tolerance in allowed.items()
        if not theirs[f"{name}_gain"] >= -tolerance
    ]


def _design(figures: dict[str, Any], settings: GateConfig) -> list[str]:
    """The original document's thresholds, on paired reconstruction."""
    reasons = []
    if not figures["lpips"] <= settings.lpips_max:
        reasons.append(f"LPIPS {figures['lpips']:.3f} is above {settings.lpips_max:.2f}")
    if not figures["masked_psnr"] >= settings.psnr_min:
        reasons.append(f"masked PSNR {figures['masked_psnr']:.2f} dB is below {settings.psnr_min:.1f} dB")
    return reasons


def _evidence(figures: dict[str, Any], settings: GateConfig) -> tuple[list[str], list[str]]:
    """Exact preservation, better than every baseline beyond chance, near enough to the ceiling: reasons against, and notes.

    Each baseline is judged where it can lose: colour transfer has the reference's colour by construction, so it must be beaten in
    length, pair by pair; crop-paste has the reference's own hair, so it must be beaten where there is a truth. Colour in transfer: the
    95 % intervals lie apart. Curl, length and reconstruction: the interval of the gain, photo by photo, lies above zero. A lack of curl
    counts where it could be shown: where Stage 1 reads it from the reference photo itself after the VAE.
    """
    reasons, notes = [], []
    base = figures["baselines"]
    for protocol, heads in (("transfer", figures["heads"]), ("reconstruction", figures["heads_reconstruction"])):
        if heads < MIN_HEADS:
            reasons.append(f"the {protocol} pairs are of {heads} heads; intervals over fewer than {MIN_HEADS} say nothing")
    if base["bald"]["lpips_gain_ci"] == base["bald"]["masked_psnr_gain_ci"] == [0.0, 0.0]:
        reasons.append("the results are the bald images: no hair is painted")
    if base["shuffled_reference"]["mean_abs_change"] == 0:
        reasons.append("the results are the same whatever the reference: the model ignores it")
    if figures["outside_max_abs_diff"] != 0:
        reasons.append(f"pixels outside the mask changed by up to {figures['outside_max_abs_diff']}")
    for name, figure in (
        ("no_op", "hair_color_delta_e"), ("shuffled_reference", "hair_color_delta_e"), ("bald", "hair_color_delta_e")
    ):  # fmt: skip
        reasons += _not_below(figures, base[name], figure, f"{_NAMES[figure]} against {name}")
    if "hair_length_error_gain_ci" in base["colour_transfer"]:
        reasons += _no_gain(base["colour_transfer"], "hair_length_error_gain", f"{_NAMES['hair_length_error']} against colour_transfer")
    else:
        notes.append(f"{_NAMES['hair_length_error']} was not judged: no reference photo shows a face to measure it by")
    curl_reasons, curl_notes = _curl(figures)
    for name in ("bald", "no_conditioning", "shuffled_reference", "crop_paste"):
        reasons += _no_gain(base[name], "lpips_gain", f"reconstruction LPIPS against {name}")
        lacking = _no_gain(base[name], "masked_psnr_gain", f"reconstruction PSNR in the hair against {name}")
        # real strands that lie beside the truth's cost more PSNR than a blur, so for them LPIPS decides
        (notes if name == "crop_paste" else reasons).extend(lacking)
    reasons += curl_reasons + _far_from_the_ceiling(figures, settings)
    notes += curl_notes
    failed_reasons, failed_notes = _failures(figures, settings)
    lost_reasons, lost_notes = _identity(figures)
    return reasons + failed_reasons + lost_reasons, notes + failed_notes + lost_notes


def _failures(figures: dict[str, Any], settings: GateConfig) -> tuple[list[str], list[str]]:
    """Above the cap is a reason where it is so beyond chance, else a note."""
    if "failure_rate" not in figures:
        return [], ["failures were not judged: the detector finds a face in none of the photos themselves"]
    if figures["failure_rate"] <= settings.failure_max:
        return [], []
    low, high = figures["failure_rate_ci"]
    said = [
        f"{figures['failure_rate']:.1%} of the results are no picture or show no face that the detector finds; {settings.failure_max:.0%} are "
        f"the cap (interval {low:.1%} to {high:.1%})"
    ]
    return ([], said) if low <= settings.failure_max else (said, [])


def _identity(figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lost identities are a reason where most are lost beyond chance, else a note."""
    if "identity_kept" not in figures:
        return [], ["identity was not judged: too few photos show an intact face"]
    if figures["identity_kept"] >= IDENTITY_KEPT:
        return [], []
    said = [
        f"{figures['identity_kept']:.1%} of the results are recognised as their person, {IDENTITY_KEPT:.0%} are wanted "
        f"(similarity above {figures['identity_different_people_p95']:.3f}, the 95th percentile of different people)"
    ]
    return ([], said) if figures["identity_kept_ci"][1] >= IDENTITY_LOST else (said, [])


def _curl(figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Against the shuffled reference, pair by pair; without a gain it is a reason only where the VAE lets Stage 1 read curl at all."""
    if "curl_agreement" not in figures:
        return [], ["curl was not judged: no reference photo has a curl label"]
    shuffled, ceiling = figures["baselines"]["shuffled_reference"], figures["ceiling_vae"]
    lacking = _no_gain(shuffled, "curl_agreement_gain", "curl agreement against shuffled_reference")
    if not lacking or not _not_below(shuffled, ceiling, "curl_agreement", ""):
        return lacking, []
    return [], [
        f"curl was not judged: after the VAE alone Stage 1 reads the class of {ceiling['curl_agreement']:.0%} of the reference photos, "
        f"not clearly more than of results for another reference ({shuffled['curl_agreement']:.0%}); ours {figures['curl_agreement']:.0%}"
    ]


def _far_from_the_ceiling(figures: dict[str, Any], settings: GateConfig) -> list[str]:
    """How much of the way from the bald image to the VAE's own reconstruction of the same photos was gone; past its end, the truth leaks."""
    reasons = []
    bald, ceiling = figures["baselines"]["bald"], figures["ceiling_vae"]
    for name in ("lpips", "masked_psnr"):
        way = ceiling[name] - bald[name]
        share = (figures[name] - bald[name]) / way if way else 0.0
        if not share >= settings.ceiling_share:
            reasons.append(
                f"reconstruction {_NAMES[name]} {figures[name]:.3f} is {share:.0%} of the way from the bald image ({bald[name]:.3f}) to the VAE's own "
                f"reconstruction ({ceiling[name]:.3f}); {settings.ceiling_share:.0%} are wanted"
            )
    if ceiling["masked_psnr_gain_ci"][0] > 0:
        reasons.append(
            f"reconstruction PSNR in the hair {figures['masked_psnr']:.2f} dB is above what the VAE itself can do "
            f"({ceiling['masked_psnr']:.2f} dB): the model is given its answer"
        )
    return reasons


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
