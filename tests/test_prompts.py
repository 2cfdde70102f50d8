"""Values, classes and prompts against the tables of facts/khairstyle.md 1.4 and 2."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.errors import UsageError
from backend.training.data_processing import auto_translate
from backend.training.data_processing.mapping import (
    MAPPING_PATH,
    NUMERIC_FIELDS,
    english,
    english_value,
    tables,
    texture_labels,
)
from backend.training.data_processing.prompts import (
    NEUTRAL_PROMPT,
    all_prompt_words,
    choices,
    prompt_from_choice,
    write_prompt,
)

ALLOWED = {  # facts 1.4
    "basestyle": "가르마 기타남자스타일 기타레이어드 기타여자스타일 남자일반숏 댄디 루프 리젠트 리프 "
    "미스티 바디 베이비 보니 보브 "
    "빌드 소프트투블럭댄디 숏단발 쉐도우 쉼표 스핀스왈로 시스루댄디 애즈 에어 여자일반숏 원랭스 원블럭댄디 테슬 "
    "포마드 플리츠 허쉬 히피",
    "basestyle-type": "장 단",
    "length": "장발 남자 단발 중발 여숏",
    "curl": "X C J S SS SC S3 CC CS",
    "bang": "페이스라인에 통합|해당없음|시스루|살짝 넘긴스타일|기타(남자 내림머리)|풀뱅|처피뱅",
    "side": "해당없음 투블럭 원블럭",
    "partition": "가르마없음 5:5 6:4 4:6 7:3 3:7 8:2 2:8 9:1 1:9",
    "color": "블랙 자연갈색 적갈색 황갈색 기타 애쉬브라운 옴브레 투톤 핑크브라운",
    "loss": "탈모아님 초기탈모 탈모 부분탈모",
    "exceptional": "해당없음 묶음머리 넘긴머리 땋은머리 기타악세사리 악성곱슬머리 군인머리(반삭) 기타",
    "hair-width": "보통 굵음 얇음",
    "natural-curl": "반곱슬 생머리 곱슬 강곱슬",
    "damage": "손상모 극손상모 건강모 버진",
    "melanin-color": "적멜라닌 황멜라닌",
    "black-colorize": "무 유",
    "water-repellency": "무 유",
    "patch-test": "무 유",
    "sex": "여 남",
}
VALUES = {field: text.split("|") if "|" in text else text.split() for field, text in ALLOWED.items()}
attributes = st.fixed_dictionaries({field: st.sampled_from([*values, None, "모르는값"]) for field, values in VALUES.items()})


def clip_tokens(text: str) -> int:
    """An upper estimate: CLIP splits into letter runs and punctuation, and words of up to 7 letters are one token."""
    return 2 + sum(math.ceil(len(piece) / 7) for piece in re.findall(r"[a-z]+|[^a-z\s]", text.lower()))


def test_the_table_covers_every_value_of_the_facts() -> None:
    assert {field: [value for value in values if english_value(field, value) is None] for field, values in VALUES.items()} == {
        field: [] for field in VALUES
    }
    assert not any(re.search(r"[^\x20-\x7e]", text) for table in tables().fields.values() for text in table.values())


def test_one_word_means_different_things_in_different_fields() -> None:
    assert english({"hair-width": "보통", "length": "보통", "basestyle-type": "단", "age": "31"}) == {
        "hair-width": {"raw": "보통", "en": "medium"},
        "length": {"raw": "보통", "en": None},
        "basestyle-type": {"raw": "단", "en": "short"},
        "age": {"raw": "31", "en": "31"},
    }
    assert english_value("bang", "살짝넘긴스타일") == "lightly swept"  # blanks do not matter


def test_classes_come_from_the_fields() -> None:
    curls = {code: texture_labels({"curl": code}, "after")[0] for code in VALUES["curl"]}
    assert curls == {"X": 0, "J": 1, "C": 1, "CC": 1, "S": 2, "SC": 2, "CS": 2, "SS": 3, "S3": 3}
    assert [texture_labels({"hair-width": value}, "before")[1] for value in ("얇음", "보통", "굵음")] == [0, 1, 2]
    assert texture_labels({"curl": "ss", "hair-width": "굵음", "natural-curl": "생머리"}, None) == (3, 2)
    assert texture_labels({"curl": "SS", "hair-width": "굵음", "natural-curl": "생머리"}, "before") == (None, 2)
    assert texture_labels({"curl": "Z9", "hair-width": None}, "after") == (None, None)
    assert tables().classes["natural-curl"] == {"생머리": 0, "반곱슬": 1, "곱슬": 2, "강곱슬": 3}


# ---- prompts ------------------------------------------------------------------------------------


def test_a_prompt_by_hand() -> None:
    hair = {"length": "장발", "curl": "S", "color": "자연갈색", "bang": "시스루", "basestyle": "허쉬", "sex": "여"}
    prompts = {write_prompt(hair, seed=seed) for seed in range(60)}
    assert "a portrait photo of a person with long curly natural brown hair styled as a hush cut and see-through bangs" in prompts
    assert 4 <= len(prompts) <= 40
    assert write_prompt(hair, seed=7) == write_prompt(dict(reversed(hair.items())), seed=7)


def test_the_mens_cut_is_short_and_no_sex_is_said() -> None:
    for seed in range(20):
        prompt = write_prompt({"length": "남자", "basestyle": "남자일반숏", "sex": "남"}, seed=seed)
        assert "short hair" in prompt
        assert not re.search(r"\b(wo)?m[ae]n", prompt)


def test_before_photos_do_not_promise_the_later_style() -> None:
    hair = {"length": "단발", "curl": "SS", "color": "블랙", "hair-width": "굵음", "basestyle": "보브"}
    prompts = {write_prompt(hair, seed=seed, phase="before") for seed in range(40)}
    assert "a portrait photo of a person with thick strands" in prompts
    assert all(prompt.endswith(" person with thick strands") for prompt in prompts)
    assert write_prompt({**hair, "hair-width": "보통"}, seed=0, phase="before") == NEUTRAL_PROMPT


def test_nothing_known_is_the_neutral_prompt() -> None:
    nothing = {"bang": "해당없음", "color": "기타", "exceptional": "기타", "curl": "??", "hair-width": "보통"}
    assert {write_prompt(nothing, seed=seed) for seed in range(5)} == {write_prompt({}, seed=1)} == {NEUTRAL_PROMPT}


@settings(max_examples=300, deadline=None)
@given(hair=attributes, seed=st.integers(0, 2**64), phase=st.sampled_from(["before", "after", None]))
def test_every_prompt_is_clean_english(hair: dict[str, str | None], seed: int, phase: str | None) -> None:
    prompt = write_prompt(hair, seed=seed, phase=phase)
    assert re.fullmatch(r"[a-z]+(?:(?:,? |-)[a-z]+)*", prompt), prompt
    words = re.findall(r"[a-z]+", prompt)
    content = [word for word in words if word not in {"a", "an", "of", "and", "the", "in", "with", "as", "from", "over"}]
    assert len(content) == len(set(content)), prompt
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt), prompt
    assert set(words) <= set(all_prompt_words())
    assert clip_tokens(prompt) <= 60, prompt


def test_prompts_tell_styles_apart() -> None:
    """The earlier attempt's prompts all parsed to one class; here each curl code and length leaves its mark."""
    by_curl = {code: write_prompt({"length": "장발", "curl": code}, seed=0) for code in VALUES["curl"]}
    assert len(set(by_curl.values())) == 6  # straight, three kinds of ends, curly, tightly curled
    assert len({write_prompt({"length": value}, seed=0) for value in VALUES["length"]}) == 4


def test_pickers_share_the_phrases() -> None:
    assert prompt_from_choice(length="long", curl="curly", colour="natural brown", bangs="see-through", seed=3) == write_prompt(
        {"length": "장발", "curl": "S", "color": "자연갈색", "bang": "시스루"}, seed=3
    )
    assert prompt_from_choice() == NEUTRAL_PROMPT
    words = set(all_prompt_words())
    for argument, options in choices().items():
        for option in options:
            prompt = prompt_from_choice(**{argument: option})  # type: ignore[arg-type]
            assert prompt != NEUTRAL_PROMPT and set(re.findall(r"[a-z]+", prompt)) <= words
    with pytest.raises(UsageError, match="purple"):
        prompt_from_choice(colour="purple")


# ---- values without English ---------------------------------------------------------------------


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    folder = tmp_path / "labels"
    folder.mkdir()
    one = {"filename": "CP000001-001.jpg", "basestyle": "새로운컷", "curl": "X", "age": 24, "comment": "좋아요"}
    (folder / "CP000001_001.json").write_text(json.dumps(one), encoding="utf-8")
    entries = [{"file_name": "img01.jpg", "basestyle": "새로운컷", "color": "은색", "loss": "nan"}, "broken"]
    (folder / "pack.json").write_text(json.dumps({"annotation": entries}), encoding="utf-8")
    (folder / "bad.json").write_bytes(b"{")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    return folder


def test_missing_values_are_found(labels: Path) -> None:
    missing = auto_translate.find_missing(auto_translate.label_records(labels))
    assert missing == {"basestyle": Counter({"새로운컷": 2}), "color": Counter({"은색": 1})}
    assert not NUMERIC_FIELDS & missing.keys()


def test_the_diff_adds_the_proposals_and_nothing_else(labels: Path) -> None:
    missing = auto_translate.find_missing(auto_translate.label_records(labels))
    proposal = auto_translate.propose(missing, {"새로운컷": "New cut ", "은색": ""}.__getitem__)
    assert proposal["basestyle"] == {"새로운컷": {"count": 2, "en": "new cut"}}
    diff = auto_translate.mapping_diff(proposal)
    added = [line[1:].strip().rstrip(",") for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert '"새로운컷": "new cut"' in added and '"은색": "TODO"' in added
    assert f'"version": {tables().version + 1}' in added
    removed = [line[1:].strip().rstrip(",") for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert len(added) == len(removed) + 2  # a neighbouring line gains a comma
    assert auto_translate.mapping_diff({}) == ""


def test_command_line_writes_a_proposal_and_leaves_the_mapping_alone(labels: Path, tmp_path: Path) -> None:
    before = MAPPING_PATH.read_bytes()
    assert auto_translate.main([str(labels), "--out", str(tmp_path / "out")]) == 3
    written = json.loads((tmp_path / "out/missing.json").read_text(encoding="utf-8"))
    assert written["color"]["은색"]["count"] == 1
    assert "새로운컷" in (tmp_path / "out/mapping_dict.diff").read_text(encoding="utf-8")
    assert MAPPING_PATH.read_bytes() == before
    for name in ("CP000001_001.json", "pack.json"):
        (labels / name).unlink()
    assert auto_translate.main([str(labels), "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def test_a_translator_that_reaches_for_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in package with Argos Translate's interface, which goes online as the real one may."""
    calls: list[str] = []

    class Translation:
        def translate(self, text: str) -> str:
            calls.append(text)
            if text == "은색":
                socket.create_connection(("127.0.0.1", 9))
            return "Silver Cut"

    class Language:
        def __init__(self, code: str) -> None:
            self.code = code

        def get_translation(self, to: Language) -> Translation:
            assert (self.code, to.code) == ("ko", "en")
            return Translation()

    module = types.ModuleType("argostranslate.translate")
    module.get_installed_languages = lambda: [Language("en"), Language("ko")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "argostranslate", types.ModuleType("argostranslate"))
    monkeypatch.setitem(sys.modules, "argostranslate.translate", module)
    connect = socket.socket.connect
    proposal = auto_translate.propose({"color": Counter({"새로운컷": 2, "은색": 1})}, auto_translate.argos_translator())
    assert calls == ["새로운컷", "은색"]
    assert {raw: entry["en"] for raw, entry in proposal["color"].items()} == {"새로운컷": "silver cut", "은색": None}
    assert socket.socket.connect is connect
