"""The page without a browser: its words are complete in both languages, and it asks nobody but its own server."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from backend.app.api import STATIC
from backend.app.problems import PROBLEMS
from backend.config import REPO_ROOT
from backend.demo.gallery import LOOKS, MAX_BYTES
from backend.imaging.decode import decode_upload
from backend.training.data_processing.prompts import choices
from tests.page_node import in_node

HTML = (STATIC / "index.html").read_text()
SCRIPTS = {path.relative_to(STATIC).as_posix(): path.read_text() for path in STATIC.rglob("*.js")}
CODE = {name: text for name, text in SCRIPTS.items() if not name.startswith("words/")}


@cache
def words(language: str) -> dict[str, str]:
    """A language's words; those of a table as table.key."""
    found, table = {}, ""
    for line in SCRIPTS[f"words/{language}.js"].splitlines():
        if match := re.fullmatch(r"  (\w+): \{", line):
            table = f"{match[1]}."
        elif line == "  },":
            table = ""
        elif match := re.fullmatch(r'\s+"?([\w -]+?)"?: "(.*)",', line):
            found[table + match[1]] = match[2]
        else:
            assert line.startswith(("//", "export", "};")), line
    return found


def test_both_languages_say_the_same_things() -> None:
    assert list(words("en")) == list(words("vi"))
    assert len(words("en")) > 100
    for key, text in words("en").items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", words("vi")[key])), key
        assert text.strip() and words("vi")[key].strip(), key


def test_every_word_is_known_and_none_is_idle() -> None:
    asked = set(re.findall(r'data-i18n(?:-\w+)?="(\w+)"', HTML))
    quoted = {text for code in CODE.values() for text in re.findall(r'"(\w+)"', code)}
    made = ("pick_", "mode_")  # their ends come from the server
    known = {key for key in words("en") if "." not in key}
    assert asked <= known
    assert {key for key in known - asked - quoted if not key.startswith(made)} == set()
    for code in CODE.values():
        assert set(re.findall(r'\b(?:t|tell|hint)\("(\w+)"', code)) <= known


def test_every_problem_that_a_person_can_meet_is_said_in_words() -> None:
    sources = [path for part in ("app", "tryon") for path in (REPO_ROOT / "backend" / part).glob("*.py")]
    sources += [REPO_ROOT / "backend/imaging/decode.py"]
    # the page's own; a word for tryon's own check; what a network raises
    met = set(PROBLEMS) | {"network", "no_own_hair", "invalid_artifact"}
    for path in sources:
        met |= set(re.findall(r'(?:\bcode"? ?[=:] ?|Problem\(\s*)"(\w+)"', path.read_text()))
    met -= {"address_taken", "engine_died"}  # of a server that does not start; of a process that is started again
    assert {"crashed", "no_hair", "flat_output", "truncated", "queue_full", "few_step"} <= met
    said = {key.removeprefix("errors.") for key in words("en") if key.startswith("errors.")}
    assert met - said == set()


@pytest.mark.parametrize("language", ["en", "vi"])
def test_what_a_picker_can_offer_has_a_name(language: str) -> None:
    assert {value for values in choices().values() for value in values} <= {key.removeprefix("values.") for key in words(language)}


def test_the_gallery_is_small_named_and_readable() -> None:
    pictures = sorted((STATIC / "gallery").iterdir())
    assert {path.stem for path in pictures} == set(LOOKS) == {key[6:] for key in words("en") if key.startswith("looks.")}
    assert sum(path.stat().st_size for path in pictures) <= MAX_BYTES
    for path in pictures:
        assert decode_upload(path.read_bytes(), max_pixels=10**6).shape == (512, 512, 3)


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"\sstyle=|<style|\son\w+=|javascript:", HTML)
    assert all(re.match(r'<script type="module" src="/static/\w+\.js">$', tag) for tag in re.findall(r"<script[^>]*>", HTML))
    for text in (HTML, *SCRIPTS.values(), *(path.read_text() for path in STATIC.glob("*.css"))):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|\beval\(|innerHTML", text)


def test_every_file_that_is_named_is_there_and_every_file_is_named() -> None:
    used = {Path(name).name for name in re.findall(r'(?:src|href)="/static/([\w./]+)"', HTML)}
    for name, text in SCRIPTS.items():
        for imported in re.findall(r'from "(\./[\w./]+)"', text):
            path = (STATIC / name).parent / imported
            assert path.is_file(), f"{name} imports {imported}"
            used.add(path.name)
    assert {path.name for path in STATIC.rglob("*") if path.suffix in (".js", ".css", ".svg")} == used
    assert set(re.findall(r'href="#(i-\w+)"', HTML)) == set(re.findall(r'<symbol id="(i-\w+)"', HTML))


# ---- the modules in Node ----

BEGUN = """
kept["deephair-jobs"] = JSON.stringify(["gone", "done", "open", "broken", "erased"]);
const view = (id, state, more = {}) => ({ id, state, photos_deleted: false, error: null, progress: null, result: null, ...more });
const done = { url: "", info: { seed: 7 } };
const jobs = {
  done: view("done", "succeeded", { result: done }),
  open: view("open", "running"),
  broken: view("broken", "failed", { error: { code: "internal" } }),
  erased: view("erased", "cancelled", { photos_deleted: true }),
};
function server(path, options, times) {
  const [, , , , id, part] = path.split("/");
  if (!(id in jobs)) return problem(404, "not_found");
  if (!part) return times === 0 && id === "done" ? [502, "<html>Bad Gateway</html>"] : [200, jobs[id]];
  if (part === "result") return [200, `picture of ${id}`];
  return [200, [jobs[id], ...(id === "open" ? [{ done: 1, total: 2, fraction: 0.5, eta_s: null }, view(id, "succeeded", { result: done })] : [])]];
}
const { remembered, takeUp } = await import("./static/tryon.js");
const { expect } = await import("./static/stage.js");
const found = await remembered();
const shots = expect(found.map(() => null), null);
await takeUp(found, shots);
told({ found: found.map(({ id }) => id), shots, kept: JSON.parse(kept["deephair-jobs"]), waited: pauses, waiting: elements.waiting.hidden,
       alone: elements.slider.names.has("alone"), problem: elements.problem ? elements.problem.hidden : null, download: elements.download.download });
"""


def test_a_page_that_is_loaded_again_shows_what_is_ready_and_follows_what_runs(tmp_path: Path) -> None:
    story = in_node(tmp_path, BEGUN)
    assert story["found"] == ["done", "open"] and all(shot["url"].startswith("blob:") for shot in story["shots"])
    assert [shot["seed"] for shot in story["shots"]] == [7, 7] and story["download"] == "deephair-7.png"
    assert sorted(story["kept"]) == ["broken", "done", "open"]  # what the server may still have can still be deleted
    assert story["waited"] and story["problem"] is None and story["alone"] and story["waiting"]


STARTED = """
kept["deephair-jobs"] = JSON.stringify(["done"]);
const job = { id: "done", state: "succeeded", photos_deleted: false, progress: null, result: { info: { seed: 7 } } };
function server(path) {
  if (path.endsWith("/result")) return [200, "picture"];
  if (path.endsWith("/events")) return [200, [job]];
  if (path.includes("/jobs/")) return [200, job];
  if (path.endsWith("/models")) return [200, { loaded: true, miniature: true, bundle_sha256: "a".repeat(64), sampling: {} }];
  return problem(404, "not_found");
}
await import("./static/app.js");
for (let n = 0; n < 500 && elements.compare?.hidden !== false; n += 1) await new Promise((resume) => setImmediate(resume));
const { download, compare, problem: shown } = elements;
told({ download: download.download, compare: compare.hidden, problem: shown?.hidden ?? true });
"""


def test_the_pages_start_takes_up_what_was_begun(tmp_path: Path) -> None:
    assert in_node(tmp_path, STARTED) == {"download": "deephair-7.png", "compare": False, "problem": True}


FOLLOWED = """
const running = { state: "running", progress: { done: 3, total: 9, fraction: 0.33, eta_s: 1 } };
const ways = [
  () => [502, "<html>Bad Gateway</html>"],                       // the stream, by a proxy
  () => { throw new Error("broken"); },                          // the job, by nobody
  () => problem(503, "storage"),                                 // the job
  () => [200, running],                                          // the job
  () => [504, { message: "a proxy's own JSON" }],                // the stream
  () => [200, running],                                          // the job
  () => [200, [{ state: "running" }, { done: 4, total: 9 }]],    // a stream that is cut
  () => [200, running],
  () => [200, "<html>a page for people</html>"],                 // no stream at all
  () => [200, { state: "succeeded" }],
];
function server() { return ways.shift()(); }
const { follow } = await import("./static/api.js");
const states = [], steps = [];
const ended = await follow("x", ({ state }) => states.push(state), ({ done }) => steps.push(done));
let thrown = null;
ways.push(() => problem(404, "not_found"));
await follow("y", () => {}, () => {}).catch((error) => (thrown = error.problem.code));
told({ ended, states, steps, left: ways.length, thrown, pauses });
"""


def test_a_job_is_followed_through_a_proxy_that_stumbles(tmp_path: Path) -> None:
    story = in_node(tmp_path, FOLLOWED)
    assert story["ended"] == {"state": "succeeded"} and story["left"] == 0 and story["thrown"] == "not_found"
    assert (story["states"], story["steps"]) == (["running"], [3, 3, 4, 3])
    assert len(story["pauses"]) == 6 and min(story["pauses"]) >= 1000  # a server that is away is not stormed


AWAY = """
function server(path) {
  if (path.includes("always")) return [502, "<html>Bad Gateway</html>"];
  return [413, "<html>too large</html>"];
}
const api = await import("./static/api.js");
const thrown = [];
await api.follow("always", () => {}, () => {}).catch((error) => thrown.push(error.problem.code));
await api.createJob({}).catch((error) => thrown.push(error.problem.code));
told({ thrown, minutes: pauses.reduce((one, other) => one + other, 0) / 60000 });
"""


def test_a_server_that_stays_away_is_given_up_after_minutes(tmp_path: Path) -> None:
    story = in_node(tmp_path, AWAY)
    assert story["thrown"] == ["network", "upload_too_large"] and 2 < story["minutes"] < 10


SENT = """
const succeeded = (id) => ({ id, state: "succeeded", result: { info: {} } });
let made = 0, onSent = () => {};
const refused = new Set();
function server(path, options) {
  const id = path.split("/")[4];
  if (options.method === "DELETE") return [204, null];
  if (options.method === "POST") {
    made += 1;
    onSent(made);
    return refused.has(made) ? problem(429, "queue_full") : [202, { id: `j${made}`, state: "queued" }];
  }
  if (path.endsWith("/events")) return [200, [erased.has(id) ? { state: "cancelled" } : succeeded(id)]];
  return [200, "picture"];
}
const erased = new Set();
const { tryOn, cancel } = await import("./static/tryon.js");
const { expect } = await import("./static/stage.js");
const run = () => { made = 0; return tryOn({ prompt: "bob" }, expect([1, 2, 3, 4], "photo")); };
refused.add(3);
const full = await run();
refused.clear();
onSent = (count) => { if (count === 2) { erased.add("j1"); erased.add("j2"); cancel(); } };
const cancelled = await run();
told({ full, cancelled, deleted: asked.filter((one) => one.startsWith("DELETE")), kept: JSON.parse(kept["deephair-jobs"]) });
"""


def test_what_was_cancelled_is_not_called_refused_and_a_refusal_says_why(tmp_path: Path) -> None:
    story = in_node(tmp_path, SENT)
    assert story["full"]["taken"] == 2 and story["full"]["refusal"]["code"] == "queue_full"
    assert story["cancelled"] == {"taken": 2, "refusal": None}
    assert story["deleted"] == ["DELETE /api/v1/jobs/j1", "DELETE /api/v1/jobs/j2"]
    assert "{reason}" in words("en")["notAll"] and "reason: problemText(refusal)" in CODE["app.js"]


SAID = """
const { errorText, setLanguage } = await import("./static/i18n.js");
setLanguage("vi");
const wrong = { code: "invalid_form", detail: "steps: Input should be less than or equal to 200",
                errors: [{ field: "steps", message: "" }, { field: "color", message: "" }] };
told([errorText(wrong), errorText({ code: "invalid_form", detail: "x" }), errorText({ code: "crashed", message: "x" })]);
"""


def test_a_value_that_is_not_taken_is_named_in_the_persons_language(tmp_path: Path) -> None:
    named, unnamed, crashed = in_node(tmp_path, SAID)
    assert words("vi")["steps"] in named and words("vi")["pick_color"] in named and "200" in named and "Input" not in named
    assert (unnamed, crashed) == (words("vi")["errors.invalid_form"], words("vi")["errors.crashed"])
