"""notebooks/demo.ipynb: committed without outputs, and its cells run in order.

They are executed by the few lines below and not by nbclient, which would bring a kernel and about thirty packages for what is one namespace and one
function: ``display``, which the kernel provides and which collects the pictures here.
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend import artifacts
from backend.config import REPO_ROOT
from backend.demo.world import MARK, set_mark
from tests.conftest import World

NOTEBOOK = REPO_ROOT / "notebooks/demo.ipynb"


def _code() -> list[str]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs_whose_cells_are_python() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and cell["source"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for source in _code():
        ast.parse(source)  # no line magics: the cells run as a script too


@pytest.mark.long  # it takes the demo's way through the command line once more
def test_its_cells_run_and_show_pictures(
    finished_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (REPO_ROOT / ".venv/bin/deephair").is_file():
        pytest.skip("the notebook calls the checkout's own .venv, which make sets up")
    world = finished_world.copy(tmp_path / "notebook", "processed", "checkpoints", "models", "report")
    (world.root / "photos").unlink()
    shutil.copytree(finished_world.root / "photos", world.root / "photos")
    artifacts.write_json(world.root / "photos" / MARK, set_mark("demo"))  # demo-data then finds its work done
    monkeypatch.setenv("DEEPHAIR_OVERRIDES", shlex.join(world.arguments()[2:]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(NOTEBOOK.parent)
    shown: list[Image.Image] = []
    namespace: dict[str, Any] = {"display": shown.append}
    for number, source in enumerate(_code(), 1):
        exec(compile(source, f"cell {number}", "exec"), namespace)
    said = capsys.readouterr().out
    assert "largest change outside the mask: 0" in said and "CIEDE2000: " in said
    assert len(shown) == 2  # a preview, and target, reference and result beside each other
    assert shown[1].width >= 3 * 200 and len(set(shown[1].getdata())) > 100
