"""What the pages on serving say: the curl examples run, and the container files hold what is promised of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from backend.app.problems import PROBLEMS
from backend.app.uploads import JobOptions
from backend.config import REPO_ROOT, known_keys
from backend.tryon.values import TryOnResult
from tests.app_standin import StandIn, app_config, composite, decoded, picture, png, serving

API = (REPO_ROOT / "docs/api.md").read_text(encoding="utf-8")
SERVING = (REPO_ROOT / "docs/serving.md").read_text(encoding="utf-8")
DOCKER = REPO_ROOT / "docker"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_the_examples_of_the_api_page_run_in_their_order(tmp_path: Path) -> None:
    examples = re.findall(r"```sh\n(.*?)```", API, re.DOTALL)
    assert len(examples) >= 8
    Image.fromarray(picture(120, 160, seed=1)).save(tmp_path / "me.jpg")
    (tmp_path / "hairstyle.jpg").write_bytes(png(seed=2))
    engine = StandIn()
    with serving(app_config(tmp_path, gallery=tmp_path), engine) as live:
        # the page's reader fetches the result when the stream has ended; so does this script
        script = "set -euo pipefail\n" + "\n".join(examples).replace("http://127.0.0.1:8000", f"http://127.0.0.1:{live.port}")
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for job in re.findall(r'"id":"([^"]+)"', done.stdout):
            live.wait(job)
    first: TryOnResult = composite(engine.seen[0])
    assert (decoded((tmp_path / "result.png").read_bytes()) == first.image).all() and (tmp_path / "changed.png").is_file()
    assert "event: progress" in done.stdout and "hairstyle.jpg" in done.stdout
    assert [(seen.mode, seen.strength) for seen in engine.seen] == [("full", 1.0), ("full", 0.8), ("colour", 1.0)]


def test_the_pages_name_every_field_problem_and_setting() -> None:
    for field in JobOptions.model_fields:
        assert f"`{field}`" in API, field
    for code in set(PROBLEMS) - {"internal"}:
        assert f"`{code}`" in API, code
    settings = set(re.findall(r"`((?:app|sample)\.\w+)`", SERVING))
    assert settings >= {key for key in known_keys() if key.startswith("app.")} and settings <= set(known_keys())


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_an_image_runs_as_nobody_in_particular_and_installs_what_is_locked(name: str) -> None:
    lines = [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert [line for line in final if line.startswith("USER ")] == ["USER deephair"]
    assert not any(line.startswith("COPY") for line in final[final.index("USER deephair") :])  # code is root's
    text = "\n".join(lines)
    assert "--require-hashes -r requirements.lock" in text and "ADD " not in text and "http://" not in text.replace("http://127.0.0.1", "")
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((REPO_ROOT / part).exists() for part in source.split())
    assert f"device={'cuda' if name.endswith('cuda') else 'cpu'}" in lines[-1]


def test_the_composition_is_a_private_redis_and_two_read_only_workers() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    workers = [services["services"][name] for name in ("worker1", "worker2")]
    for service in services["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert services["networks"]["queue"]["internal"] and "ports" not in services["services"]["redis"]
    for worker in workers:
        assert "app.queue=redis://redis:6379/0" in worker["command"] and all(port.startswith("127.0.0.1:") for port in worker["ports"])
        assert all(volume.endswith(":ro") for volume in worker["volumes"])
    assert "always" in services["services"]["redis"]["command"]  # an accepted job survives a power cut
