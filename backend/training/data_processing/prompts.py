"""Prompts in natural English from a label's attributes or from a picker's choice, both through the same phrases
(DESIGN 4.1).

A prompt tells what is visible in an 'after' photo: length, curl, colour, bangs, cut, parting, sides, strands. What
says nothing (no bangs, other, medium strands) and what is unknown is left out; no word is said twice; salon codes and
Korean words never get through. The person is always 'a person': the men's cut is a length (short), and sex is no
attribute of a hairstyle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

from backend.errors import UsageError
from backend.training.data_processing.mapping import english_value, texture_labels

NEUTRAL_PROMPT = "a portrait photo of a person"

LENGTHS = {"long": "long", "medium": "medium-length", "bob": "chin-length", "short": "short"}
CURLS = {"straight": "straight", "wavy": "wavy", "curly": "curly", "tightly curly": "tightly curled"}
COLOURS = {
    name: name
    for name in (
        "black",
        "natural brown",
        "reddish brown",
        "golden brown",
        "ash brown",
        "ombre",
        "two-tone",
        "pinkish brown",
        "blonde",
        "gray",
        "red",
    )
}
BANGS = {
    "face-framing": "face-framing bangs",
    "see-through": "see-through bangs",
    "swept": "lightly swept bangs",
    "full": "full bangs",
    "choppy": "choppy bangs",
    "combed down": "a fringe combed down over the forehead",
}

_LENGTH_OF = {
    "long": "long",
    "medium": "medium",
    "bob": "bob",
    "short (men's cut)": "short",
    "short (women's cut)": "short",
}
_CURL_OF_CLASS = tuple(CURLS)
_BANGS_OF = {
    "blended into the face line": "face-framing",
    "see-through": "see-through",
    "lightly swept": "swept",
    "other (men's hair combed down)": "combed down",
    "full": "full",
    "choppy": "choppy",
}
_ENDS = {
    "slightly bent ends": "slightly bent ends",
    "inward curled ends": "ends turned inward",
    "doubly curled ends": "doubly turned ends",
}
_STYLES = {  # only styles that say something beside length, curl and bangs
    "parted perm": "parted perm",
    "other layered cut": "layered cut",
    "dandy cut": "dandy cut",
    "loop perm": "loop perm",
    "regent cut": "regent cut",
    "leaf cut": "leaf cut",
    "misty perm": "misty perm",
    "body perm": "body perm",
    "baby perm": "baby perm",
    "bonnie perm": "bonnie perm",
    "bob cut": "bob cut",
    "build perm": "build perm",
    "soft two-block dandy cut": "soft dandy cut",
    "short bob": "bob cut",
    "shadow perm": "shadow perm",
    "comma hair": "comma cut",
    "spin swallow perm": "spin swallow perm",
    "see-through dandy cut": "dandy cut",
    "as perm": "parted volume perm",
    "air perm": "air perm",
    "one-length cut": "blunt cut",
    "one-block dandy cut": "dandy cut",
    "tassel cut": "tassel cut",
    "pomade style": "slick pomade look",
    "pleats perm": "pleats perm",
    "hush cut": "hush cut",
    "hippie perm": "hippie perm",
    "mohawk": "mohawk",
    "mushroom cut": "mushroom cut",
    "crop cut": "crop cut",
    "v-shaped cut": "pointed cut",
}
_PARTS = {
    "middle part": "a middle part",
    "off-center part": "an off-center part",
    "side part": "a side part",
    "deep side part": "a deep side part",
    "very deep side part": "a very deep side part",
}
_SIDES = {"two-block": "an undercut", "one-block": "trimmed sides"}
_STRANDS = {"fine": "fine strands", "thick": "thick strands"}
_EXTRAS = {
    "tied": "tied up",
    "swept back": "combed away from the face",
    "braided": "braided",
    "accessory": "decorated with an accessory",
    "frizzy": "frizzy",
    "buzz cut": "buzzed",
}
_OPENINGS = (
    "a portrait photo of a person with",
    "a photo of a person with",
    "a portrait of a person with",
    "a person with",
)
_STYLE_WORDS = ("styled as {}", "in {}")
_FREE_WORDS = frozenset({"a", "an", "and", "as", "of", "the", "in", "with", "from", "over"})
_MAX_DETAILS = 5


def write_prompt(attributes: Mapping[str, str | None], *, seed: int, phase: str | None = None) -> str:
    """One English sentence about the hair; the same attributes and seed give the same text, other seeds give
    paraphrases.

    ``attributes`` are raw label values by field. With ``phase`` 'before' only what belongs to the person is said
    (strands), since the label then describes the later style. At most 60 CLIP tokens. Without a single known value it
    is NEUTRAL_PROMPT.
    """
    said = {field: english_value(field, raw) for field, raw in attributes.items()}
    if phase == "before":
        said = {"hair-width": said.get("hair-width")}
    curl_class, _ = texture_labels(attributes, phase)
    curl = None if curl_class is None else _CURL_OF_CLASS[curl_class]
    ends = _ENDS.get(said.get("curl") or "")
    return _sentence(
        [
            LENGTHS.get(_LENGTH_OF.get(said.get("length") or "", "")),
            CURLS.get(curl or "") if ends is None else None,
            COLOURS.get(said.get("color") or ""),
        ],
        [
            _bangs_phrase(said.get("bang")),
            ends,
            _PARTS.get(said.get("partition") or ""),
            _SIDES.get(said.get("side") or ""),
            _STRANDS.get(said.get("hair-width") or ""),
        ],
        style=_STYLES.get(said.get("basestyle") or ""),
        extra=_EXTRAS.get(said.get("exceptional") or ""),
        seed=seed,
    )


def prompt_from_choice(
    length: str | None = None,
    curl: str | None = None,
    colour: str | None = None,
    bangs: str | None = None,
    *,
    seed: int = 0,
) -> str:
    """The prompt of an attribute picker. Each choice is a key of :func:`choices`, or None for 'as it comes'. Raises
    UsageError."""
    chosen = {"length": length, "curl": curl, "colour": colour, "bangs": bangs}
    phrases = {name: _chosen_phrase(name, value) for name, value in chosen.items()}
    return _sentence([phrases["length"], phrases["curl"], phrases["colour"]], [phrases["bangs"]], style=None, extra=None, seed=seed)


def choices() -> dict[str, tuple[str, ...]]:
    """What a picker can offer, by argument of :func:`prompt_from_choice`."""
    return {name: tuple(table) for name, table in _pickers().items()}


def all_prompt_words() -> list[str]:
    """Every lower-case word (run of letters) that a prompt can hold, sorted; a tokenizer needs ',', '-' and '.'
    beside them."""
    texts = [NEUTRAL_PROMPT, "and", "hair", "a", "an", *_OPENINGS, *_STYLE_WORDS]
    for table in (LENGTHS, CURLS, COLOURS, BANGS, _ENDS, _STYLES, _PARTS, _SIDES, _STRANDS, _EXTRAS):
        texts += table.values()
    return sorted({word for text in texts for word in _words(text)})


def _pickers() -> dict[str, dict[str, str]]:
    return {"length": LENGTHS, "curl": CURLS, "colour": COLOURS, "bangs": BANGS}


def _chosen_phrase(name: str, value: str | None) -> str | None:
    table = _pickers()[name]
    if value is not None and value not in table:
        raise UsageError(f"{name} '{value}' is unknown", hint=f"choose one of: {', '.join(table)}")
    return None if value is None else table[value]


def _bangs_phrase(said: str | None) -> str | None:
    return BANGS.get(_BANGS_OF.get(said or "", ""))


# ---- one sentence ------------------------------------------------------------


def _sentence(adjectives: list[str | None], details: list[str | None], *, style: str | None, extra: str | None, seed: int) -> str:
    """'<opening> long wavy black hair[, tied up], styled as a hush cut, full bangs and a side part', no content word
    twice."""
    used: set[str] = set()
    words = [text for text in adjectives if text and _claim(text, used)]
    cut = style if style and _claim(style, used) else None
    manner = extra if extra and _claim(extra, used) else None
    rest = [text for text in details if text and _claim(text, used)][:_MAX_DETAILS]
    if not (words or cut or manner or rest):
        return NEUTRAL_PROMPT
    if _pick(2, seed, "order"):
        rest.reverse()
    if manner and " " not in manner:
        words.insert(len(words) // 2, manner)
        manner = None
    clauses = []
    if words or cut or manner:
        hair = (", " if _pick(2, seed, "comma") else " ").join(words) + (" hair" if words else "hair")
        clauses.append(f"{hair} {manner}" if manner else hair)
    if cut and manner:
        clauses.append(_with_article(cut))
    elif cut:
        clauses[0] += " " + _STYLE_WORDS[_pick(len(_STYLE_WORDS), seed, "style")].format(_with_article(cut))
    return f"{_OPENINGS[_pick(len(_OPENINGS), seed, 'opening')]} {_listed(clauses + rest)}"


def _claim(text: str, used: set[str]) -> bool:
    """True, and its words are taken, where ``text`` repeats no content word."""
    words = set(_words(text)) - _FREE_WORDS
    if words & used:
        return False
    used |= words
    return True


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in re.finditer(r"[a-z]+", text.lower()))


def _pick(count: int, seed: int, slot: str) -> int:
    """A number below ``count`` that depends on nothing but its arguments, in every version of every library."""
    digest = hashlib.blake2b(f"{seed}:{slot}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
