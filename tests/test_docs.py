"""What README and docs tell people to type works, or says what it needs; what they point to is there."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from backend import cli, weights
from backend.config import REPO_ROOT, known_keys
from tests.documents import NEEDS, Block, blocks, command_of, documents, inline_commands

BLOCKS = [block for path in documents() for block in blocks(path)]
RUN = [block for block in BLOCKS if not block.mark]
COMMANDS = [block for block in BLOCKS if block.mark != "none" and block.fence in (None, "", "sh", "bash")]
_PLACEHOLDER = re.compile(r"^[A-Z_]{2,}(\.\.\.)?$|ID$")


def _ids(chosen: list[Block]) -> list[str]:
    return [block.name for block in chosen]


def _run(block: Block) -> None:
    """Runs a block's lines one by one in the checkout, as a person in it would, with nothing to connect to."""
    own = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{own}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for command in block.commands:
        here = command.replace(".venv/bin/", f"{own}/")
        done = subprocess.run(here, shell=True, cwd=REPO_ROOT, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{block.name}: {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("block", RUN, ids=_ids(RUN))
def test_a_block_without_a_mark_runs_as_it_stands(block: Block) -> None:
    assert block.fence in (None, "", "sh", "bash"), f"{block.name}: a {block.fence} block is no command; mark it"
    _run(block)


@pytest.mark.long  # two plans of the largest network; in this process, which has loaded torch and diffusers for other tests
def test_the_memory_plans_of_the_training_page(caplog: pytest.LogCaptureFixture) -> None:
    """The page's two commands run, and the table of presets says what they print."""
    name = "test_the_memory_plans_of_the_training_page"
    (block,) = (block for block in BLOCKS if block.file == "docs/training.md" and name in block.mark)
    page = (REPO_ROOT / "docs/training.md").read_text(encoding="utf-8")
    for command, row in zip(block.commands, ("`full-12gb` (default)", "`full-8gb`"), strict=True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert cli.main(shlex.split(command)[1:]) == 0
        (total,) = re.findall(r"^ *([\d.]+) GiB +in all", caplog.text, re.MULTILINE)
        (told,) = re.findall(rf"^\| {re.escape(row)} \|.* ([\d.]+) at batch \d \|$", page, re.MULTILINE)
        assert told == f"{float(total):.1f}", row


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark], ids=_ids([block for block in BLOCKS if block.mark]))
def test_a_mark_says_what_is_needed_or_which_test_covers_the_block(block: Block) -> None:
    kind, _, rest = block.mark.partition(" ")
    if kind == "needs":
        assert all(need in NEEDS for need in rest.split(" and ")), f"{block.name}: '{rest}', known are {', '.join(NEEDS)}"
    elif block.mark.startswith("covered by "):
        for place in block.mark.removeprefix("covered by ").split(", "):
            file, _, test = place.partition("::")
            source = REPO_ROOT / file
            assert source.is_file() and re.search(rf"^def {re.escape(test)}\(", source.read_text(), re.MULTILINE), (
                f"{block.name}: no {place}"
            )
    else:
        assert block.mark == "none", f"{block.name}: '{block.mark}' is no mark, see tests/documents.py"


def _complain(command: str) -> str:
    """What is wrong with a command that is not run; empty where nothing is."""
    words = [word for word in shlex.split(command, comments=True) if word]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    name = words[0].removeprefix(".venv/bin/")
    if name == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE))
        return "" if {word for word in words[1:] if "=" not in word} <= targets else "no such target"
    if name in ("python", "bash", "torchrun", "accelerate"):
        if "-m" in words:
            module = words[words.index("-m") + 1]
            return (
                "" if (REPO_ROOT / (module.replace(".", "/") + ".py")).is_file() or not module.startswith("backend") else "no such module"
            )
        scripts = [word for word in words[1:] if word.endswith((".py", ".sh"))]
        return "" if all((REPO_ROOT / script).is_file() for script in scripts) else "no such script"
    return _complain_of_verb(words[1:]) if name == "deephair" else ""


def _complain_of_verb(words: list[str]) -> str:
    keys = [word.partition("=")[0] for word in words if re.match(r"^[a-z_.]+=", word)]
    if unknown := [key for key in keys if key not in known_keys()]:
        return f"unknown setting {unknown[0]}"
    if words and "|" in words[-1]:  # 'models list|download|verify' stands for three
        return next(filter(None, (_complain_of_verb([*words[:-1], one]) for one in words[-1].split("|"))), "")
    try:
        cli.build_parser().parse_args(words) if not cli._has_intermixed(words) else cli._parse_intermixed(cli.build_parser(), words)
    except SystemExit as error:
        return "" if error.code == 0 else "deephair does not take these words"
    return ""


@pytest.mark.parametrize("block", COMMANDS, ids=_ids(COMMANDS))
def test_every_command_names_verbs_options_settings_and_files_that_exist(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for command in block.commands:
        wrong = _complain(command)
        assert not wrong, f"{block.name}: {command}: {wrong} {capsys.readouterr().err}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_commands_in_running_text_exist_too(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, command in inline_commands(path):
        words = command_of(command).split()
        wrong = _complain(f"{command} --help" if words[0].endswith("deephair") and len(words) == 2 else command_of(command))  # a bare verb
        assert not wrong, f"{path.name}:{line}: {command}: {wrong} {capsys.readouterr().err}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in known, f"{path.name}: {target}; known are {sorted(known)}"


def test_readme_s_tree_names_what_is_there() -> None:
    """Every file and folder of the tree exists, and every folder of the checkout with code in it is in the tree."""
    tree = next(block for block in BLOCKS if block.file == "README.md" and any(line.startswith("backend/") for line in block.text))
    said = "\n".join(tree.text)
    for name in re.findall(r"\b[a-z_0-9]+\.(?:py|sh|yaml|toml|lock)\b", said):
        assert list(REPO_ROOT.glob(f"*/{name}")) or list(REPO_ROOT.glob(f"backend/**/{name}")) or (REPO_ROOT / name).is_file(), name
    folders = {path.parent.name for path in (REPO_ROOT / "backend").glob("*/__init__.py")} | {
        "configs",
        "benchmarks",
        "docs",
        "tests",
        "notebooks",
    }
    assert {name for name in folders if f"{name}/" not in said} == set()


def test_the_model_card_s_template_has_the_headings_that_are_written() -> None:
    from backend.training.model_card import model_card

    written = model_card({"gate": {}, "metrics": {}, "base": {}, "resolution": 1024, "identity_model": "adaface"})
    template = (REPO_ROOT / "docs/model-card.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", template, re.MULTILINE) == re.findall(r"^## (.+)$", written, re.MULTILINE)


def test_every_pretrained_part_stands_on_the_pages_of_models_and_licences() -> None:
    for page in ("docs/models.md", "docs/licences.md"):
        said = (REPO_ROOT / page).read_text(encoding="utf-8")
        assert [part.name for part in weights.PARTS if f"`{part.name}`" not in said] == [], page


def test_make_demo_and_make_serve_call_verbs_with_a_configuration_that_is_there() -> None:
    """What the two first commands of README do, line by line; the stages of configs/demo.yaml and the server run in tests of their own."""
    said = subprocess.run(["make", "-n", "demo", "serve"], cwd=REPO_ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in said.splitlines() if "/deephair " in line]
    assert [line.split("/deephair ")[1].split()[0] for line in lines] == ["demo-data", "run", "serve"]
    for line in lines:
        words = shlex.split(line.split("/deephair ")[1].split(";")[0])
        assert not _complain_of_verb(words) and (REPO_ROOT / words[words.index("--config") + 1]).is_file(), line


def test_a_block_that_cannot_run_fails_and_its_mark_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n    deephair dance    a verb that is not there\n\n<!-- commands: needs a card -->\n    deephair train train.lr=1\n"
        "    deephair export\n\ntext `deephair run` text\n- item\n    no block\n\n```sh\nmake \\\n  demo\n```\n"
    )
    monkeypatch.setattr("tests.documents.REPO_ROOT", tmp_path)
    first, second, third = blocks(page)
    assert (first.commands, first.mark, first.line) == (["deephair dance"], "", 3)
    assert (second.commands, second.mark, second.line) == (["deephair train train.lr=1", "deephair export"], "needs a card", 6)
    assert (third.commands, third.fence) == (["make    demo"], "sh") or third.commands[0].split() == ["make"]
    assert list(inline_commands(page)) == [(9, "deephair run")]
    with pytest.raises(AssertionError, match="deephair dance"):
        _run(first)
    assert _complain("deephair train trian.lr=1") and _complain("make dance") and _complain("python benchmarks/none.py")
    assert not _complain("HF_ENDPOINT=https://MIRROR .venv/bin/deephair models download all")
