"""What a rendered person is made of: identity, hairstyle and scene as plain values, and how to draw them at random.

Lengths are in head units: 1.0 is about 10 cm, the head is about 2.3 high. Coordinates of the person: x to the image's
right in a frontal view, y up, z towards the camera. Colours are sRGB, 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Rgb = tuple[int, int, int]
Length = Literal["men", "women_short", "bob", "medium", "long"]
Bangs = Literal["none", "see_through", "full", "side_swept", "choppy"]
CameraHeight = Literal["mid", "high"]

LENGTHS: tuple[Length, ...] = ("men", "women_short", "bob", "medium", "long")
BANGS: tuple[Bangs, ...] = ("none", "see_through", "full", "side_swept", "choppy")
PARTINGS: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
"""Tenths of the hair that fall to the image's left; 0 means no parting (a 5:5 parting is 5)."""

HAIR_COLOURS: dict[str, tuple[Rgb, ...]] = {
    "black": ((26, 22, 22), (34, 29, 28), (20, 20, 24)),
    "natural brown": ((66, 45, 34), (78, 54, 40), (58, 40, 31)),
    "red-brown": ((112, 46, 30), (128, 52, 36), (98, 40, 30)),
    "yellow-brown": ((158, 112, 58), (176, 128, 70), (142, 98, 50)),
    "ash brown": ((112, 104, 92), (124, 117, 106), (98, 94, 86)),
    "pink brown": ((150, 82, 86), (166, 94, 98), (138, 74, 82)),
    "ombre": ((54, 38, 32), (62, 44, 36), (44, 32, 28)),
    "two-tone": ((38, 31, 30), (60, 42, 34), (46, 40, 42)),
    "other": ((58, 78, 138), (128, 74, 140), (206, 186, 148), (66, 112, 92), (196, 92, 44)),
}
"""The nine label colours of K-Hairstyle and the base tones that are drawn for each."""

TIP_COLOURS: tuple[Rgb, ...] = ((196, 150, 92), (208, 170, 116), (186, 128, 78))
STREAK_COLOURS: tuple[Rgb, ...] = ((204, 164, 108), (168, 60, 48), (86, 110, 170), (190, 150, 150))
CLOTH_COLOURS: tuple[Rgb, ...] = (
    (38, 42, 54), (226, 224, 218), (120, 60, 58), (66, 92, 84), (170, 150, 124), (84, 98, 134), (150, 152, 156),
    (206, 180, 176), (52, 52, 52), (112, 124, 92),
)  # fmt: skip
CAPE_COLOURS: tuple[Rgb, ...] = ((34, 34, 38), (58, 62, 72), (176, 178, 184), (222, 220, 216), (92, 40, 48), (70, 86, 110))


@dataclass(frozen=True)
class Identity:
    """Everything that makes the person. Shape factors are about 1.0 for the average; offsets are in head units."""

    seed: int
    sex: Literal["female", "male"]
    age: int
    skin: Rgb
    face_width: float
    face_length: float
    jaw_width: float
    chin_size: float
    chin_forward: float
    cheekbones: float
    cranium_height: float
    forehead_slope: float
    eye_spacing: float
    eye_width: float
    eye_open: float
    eye_tilt: float
    eye_depth: float
    double_lid: bool
    iris: Rgb
    brow_height: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float
    brow_shade: float
    nose_length: float
    nose_width: float
    nose_forward: float
    nose_bridge: float
    mouth_width: float
    mouth_height: float
    lip_thickness: float
    lip_curve: float
    lip: Rgb
    ear_size: float
    ear_out: float
    blush: float
    stubble: float
    moles: tuple[tuple[float, float], ...]
    hairline: float
    shoulders: float


@dataclass(frozen=True)
class Hairstyle:
    """One head of hair. `curl` 0 straight, 1 wavy, 2 curly, 3 tightly curly; `volume` 0 low, 1 normal, 2 high."""

    length: Length
    curl: int
    volume: int
    colour: str
    rgb: Rgb
    tip: Rgb | None
    highlights: float
    bangs: Bangs
    parting: int
    tied: bool
    strand_width: float
    end_height: float
    undercut: bool


@dataclass(frozen=True)
class Scene:
    """Light, background, clothes and camera. `light` points from the person to the lamp; `head` is its height / frame."""

    light: tuple[float, float, float]
    strength: float
    warmth: float
    ambient: float
    background: Literal["plain", "gradient", "salon"]
    backdrop: tuple[Rgb, Rgb]
    garment: Literal["cape", "round", "vneck", "collar"]
    garment_rgb: Rgb
    camera: CameraHeight
    head: float
    shift: float
    noise: float
    jpeg_quality: int


def _vary(rng: np.random.Generator, spread: float, centre: float = 1.0) -> float:
    """A bounded bell-shaped draw: centre +- about two spreads."""
    return float(centre + spread * np.clip(rng.normal(), -2.0, 2.0))


def _tint(rng: np.random.Generator, rgb: Rgb, spread: float) -> Rgb:
    shade = rng.normal(0.0, spread) + rng.normal(0.0, spread * 0.35, 3)
    return tuple(int(v) for v in np.clip(np.asarray(rgb) + shade, 4, 250))  # type: ignore[return-value]


def sample_identity(seed: int) -> Identity:
    """Draw a person. Equal seeds give equal people; neighbouring seeds are unrelated."""
    rng = np.random.default_rng([0x1D, seed])
    male = bool(rng.random() < 0.4)
    tone = float(rng.beta(1.6, 2.6))
    skin = np.array([246, 214, 192]) * (1 - tone) + np.array([146, 98, 70]) * tone
    lip_pale, lip_red = np.array([188, 118, 108]), np.array([196, 62, 74])
    made_up = 0.15 * rng.random() if male else rng.random()
    lip = (lip_pale * (1 - made_up) + lip_red * made_up) * (1 - 0.3 * tone)
    iris = [(44, 30, 24), (62, 42, 28), (88, 62, 38), (72, 84, 92), (70, 88, 62)][rng.choice(5, p=[0.4, 0.25, 0.15, 0.1, 0.1])]
    moles = tuple((float(rng.uniform(-0.45, 0.45)), float(rng.uniform(-0.85, 0.1))) for _ in range(int(rng.integers(0, 4))))
    return Identity(
        seed=seed, sex="male" if male else "female", age=int(rng.integers(18, 62)), skin=_tint(rng, tuple(skin), 5.0),
        face_width=_vary(rng, 0.055), face_length=_vary(rng, 0.05), jaw_width=_vary(rng, 0.10, 1.07 if male else 0.93),
        chin_size=_vary(rng, 0.14, 1.1 if male else 0.95), chin_forward=_vary(rng, 0.04, 0.0),
        cheekbones=_vary(rng, 0.12), cranium_height=_vary(rng, 0.03), forehead_slope=_vary(rng, 0.04, 0.0),
        eye_spacing=_vary(rng, 0.07), eye_width=_vary(rng, 0.10), eye_open=_vary(rng, 0.2), eye_tilt=_vary(rng, 0.09, 0.04),
        eye_depth=_vary(rng, 0.25), double_lid=bool(rng.random() < 0.6), iris=iris,
        brow_height=_vary(rng, 0.025, 0.0), brow_thickness=_vary(rng, 0.25, 1.2 if male else 0.85),
        brow_arch=_vary(rng, 0.025, 0.02 if male else 0.045), brow_tilt=_vary(rng, 0.07, 0.0), brow_shade=_vary(rng, 0.1, 0.3),
        nose_length=_vary(rng, 0.10), nose_width=_vary(rng, 0.13, 1.08 if male else 0.96),
        nose_forward=_vary(rng, 0.05, 0.0), nose_bridge=_vary(rng, 0.25),
        mouth_width=_vary(rng, 0.10), mouth_height=_vary(rng, 0.03, 0.0), lip_thickness=_vary(rng, 0.2),
        lip_curve=_vary(rng, 0.02, 0.01), lip=_tint(rng, tuple(lip), 5.0),
        ear_size=_vary(rng, 0.12), ear_out=_vary(rng, 0.07, 0.3), blush=float(rng.uniform(0.1, 1.0)),
        stubble=float(max(0.0, rng.uniform(-0.5, 1.0))) if male else 0.0, moles=moles,
        hairline=_vary(rng, 1.6, 0.0), shoulders=_vary(rng, 0.05, 1.06 if male else 0.94),
    )  # fmt: skip


_END_HEIGHT: dict[str, tuple[float, float]] = {
    "men": (-0.75, -0.45), "women_short": (-0.85, -0.6), "bob": (-1.25, -1.0), "medium": (-2.0, -1.65), "long": (-3.3, -2.6),
}  # fmt: skip


def sample_hairstyle(rng: np.random.Generator, **fixed: Any) -> Hairstyle:
    """Draw a hairstyle; every field named in `fixed` is taken as given and the rest is made to fit it.

    Raises ValueError for an unknown field, length, bangs or colour, and for classes out of range.
    """
    _refuse_unknown(Hairstyle, fixed)
    length: Length = fixed.get("length", LENGTHS[rng.choice(5, p=[0.24, 0.12, 0.18, 0.18, 0.28])])
    colour = fixed.get("colour", list(HAIR_COLOURS)[int(rng.integers(len(HAIR_COLOURS)))])
    curl, volume = int(fixed.get("curl", rng.integers(4))), int(fixed.get("volume", rng.integers(3)))
    bangs = fixed.get("bangs", BANGS[rng.choice(5, p=[0.4, 0.15, 0.15, 0.15, 0.15])])
    if length not in LENGTHS or colour not in HAIR_COLOURS or bangs not in BANGS:
        raise ValueError(f"unknown hairstyle: length {length!r}, colour {colour!r}, bangs {bangs!r}")
    if curl not in range(4) or volume not in range(3):
        raise ValueError(f"curl is {curl} (0..3 wanted), volume is {volume} (0..2 wanted)")
    tones = HAIR_COLOURS[colour]
    tips = {"ombre": TIP_COLOURS, "two-tone": STREAK_COLOURS}.get(colour)
    drawn: dict[str, Any] = dict(
        length=length, curl=curl, volume=volume, colour=colour, bangs=bangs,
        rgb=_tint(rng, tones[int(rng.integers(len(tones)))], 4.0 if colour != "black" else 1.5),
        tip=_tint(rng, tips[int(rng.integers(len(tips)))], 6.0) if tips else None,
        highlights=float(rng.uniform(0.0, 0.5)),
        parting=int(rng.choice([0, 5, 4, 6, 3, 7, 2, 8, 1, 9], p=[0.22, 0.2, 0.13, 0.13, 0.09, 0.09, 0.05, 0.05, 0.02, 0.02])),
        tied=bool(length in ("medium", "long") and rng.random() < 0.12),
        strand_width=float((0.7, 1.5, 2.4)[volume] * rng.uniform(0.95, 1.05)),
        end_height=float(rng.uniform(*_END_HEIGHT[length])),
        undercut=bool(length == "men" and rng.random() < 0.6),
    )  # fmt: skip
    drawn.update(fixed)
    return Hairstyle(**drawn)


def sample_scene(rng: np.random.Generator, **fixed: Any) -> Scene:
    """Draw light, background, clothes and camera; fields named in `fixed` are taken as given."""
    _refuse_unknown(Scene, fixed)
    side, up = rng.uniform(-0.8, 0.8), rng.uniform(0.35, 0.8)
    light = np.array([side, up, rng.uniform(0.6, 1.1)])
    light /= np.linalg.norm(light)
    cape = bool(rng.random() < 0.5)
    garment_colours = CAPE_COLOURS if cape else CLOTH_COLOURS
    wall = np.array([rng.uniform(90, 235)] * 3) + rng.normal(0, 9, 3)
    drawn: dict[str, Any] = dict(
        light=tuple(float(v) for v in light), strength=float(rng.uniform(0.56, 0.80)), warmth=float(rng.uniform(-0.05, 0.09)),
        ambient=float(rng.uniform(0.34, 0.46)), background=["plain", "gradient", "salon"][rng.choice(3, p=[0.25, 0.3, 0.45])],
        backdrop=(_tint(rng, tuple(wall), 3.0), _tint(rng, tuple(wall * rng.uniform(0.55, 0.95)), 8.0)),
        garment="cape" if cape else ["round", "vneck", "collar"][int(rng.integers(3))],
        garment_rgb=_tint(rng, garment_colours[int(rng.integers(len(garment_colours)))], 6.0),
        camera="high" if rng.random() < 0.3 else "mid", head=float(rng.uniform(0.37, 0.44)), shift=float(rng.uniform(-0.03, 0.03)),
        noise=float(rng.uniform(0.8, 2.5)), jpeg_quality=int(rng.integers(82, 96)),
    )  # fmt: skip
    drawn.update(fixed)
    return Scene(**drawn)


def _refuse_unknown(kind: type, fixed: dict[str, Any]) -> None:
    unknown = sorted(set(fixed) - set(kind.__dataclass_fields__))  # type: ignore[attr-defined]
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(kind.__dataclass_fields__)}")  # type: ignore[attr-defined]
