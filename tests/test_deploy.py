"""Deployment: killed, out of space, rolled back, compared, and written for other tools. What is deployed is whole at every moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend import artifacts, cli
from backend.errors import InvalidArtifactError, MissingInputError, UsageError
from backend.training import candidate, checkpoints, deploy, pairs, unet_export
from backend.training.export_model import GateClosedError, export
from backend.training.models.bundle import check_networks, contents_of, load_bundle, write_bundle
from backend.training.models.stage2_unet import SDXL_UNET_CONFIG, HairInpaintingUNet, empty_unet
from backend.training.models.texture_encoder import new_encoder
from backend.training.painting import SceneReader, ThreadedMap
from backend.training.prepared import Prepared
from backend.training.stage2_files import PREFIX
from backend.tryon.painter import Painter
from tests.conftest import World

NAME = "deep_hair_v1"

# Forks a child that deploys two bundles in turn without pause, kills it at a random moment, and looks at what is deployed.
KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from backend import artifacts
from backend.training.deploy import deploy, previous_path
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
sources, target = [folder / "a.bundle", folder / "b.bundle"], folder / "models" / "deep_hair_v1.safetensors"
known, seen, previous, rng = {artifacts.sha256_file(path) for path in sources}, [], [], random.Random(0)
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        while True:
            for source in sources:
                candidate = target.with_name(".candidate.safetensors.tmp")
                shutil.copyfile(source, candidate)
                deploy(candidate, target)
    time.sleep(rng.uniform(0.002, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.append(artifacts.sha256_file(target))
    kept = previous_path(target)
    previous.append(artifacts.sha256_file(kept) if kept.exists() else None)
print(json.dumps({"whole": sum(s in known for s in seen), "kinds": len(set(seen)), "previous": sum(p is None or p in known for p in previous)}))
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from backend import console
from backend.training.models.bundle import contents_of, load_bundle, write_bundle
source, target = Path(sys.argv[1]), Path(sys.argv[2])
bundle = load_bundle(source)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
def run():
    write_bundle(target, contents_of(bundle.model, bundle.texture_encoder), bundle.header)
    return 0
sys.exit(console.guarded(run))
"""


FULL_AT_THE_CARD = """
import resource, sys
from pathlib import Path
from backend.training.deploy import deploy
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
deploy(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small bundles, a.bundle and b.bundle, with an encoder of full width and the smallest UNet."""
    folder = tmp_path_factory.mktemp("bundles")
    config = {**SDXL_UNET_CONFIG, "sample_size": 8, "block_out_channels": [32, 32, 32], "cross_attention_dim": 32, "attention_head_dim": 4,
              "transformer_layers_per_block": 1, "layers_per_block": 1, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56,
              "norm_num_groups": 8}  # fmt: skip
    header = {
        "identity_model": "adaface",
        "resolution": 64,
        "base": {"name": "tiny", "sha256": "0"},
        "gate": {"profile": "evidence"},
        "metrics": {},
    }
    for number, name in enumerate("ab"):
        torch.manual_seed(number)
        encoder = new_encoder((1, 1, 1, 1), dropout=0.0, seed=number)
        write_bundle(folder / f"{name}.bundle", contents_of(HairInpaintingUNet(empty_unet(config)), encoder), header)
    return folder


def _kills(small: Path, folder: Path, rounds: int) -> dict[str, int]:
    (folder / "models").mkdir(parents=True)
    for name in "ab":
        os.link(small / f"{name}.bundle", folder / f"{name}.bundle")
    shutil.copyfile(small / "a.bundle", folder / f"models/{NAME}.safetensors")
    done = subprocess.run([sys.executable, "-c", KILLS, str(folder), str(rounds)], capture_output=True, text=True, check=True)
    load_bundle(folder / f"models/{NAME}.safetensors")
    return dict(json.loads(done.stdout))


@pytest.mark.long
def test_fifty_kills_leave_a_whole_bundle_each_time(small: Path, tmp_path: Path) -> None:
    """Every deployed file after a kill is byte for byte one of the two bundles, and both were seen; so is every previous one."""
    assert _kills(small, tmp_path / "kills", 50) == {"whole": 50, "kinds": 2, "previous": 50}


@pytest.mark.long
def test_a_full_disk_leaves_the_deployed_bundle(small: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes the write fail half-way, as a full disk does."""
    target = tmp_path / f"{NAME}.safetensors"
    shutil.copyfile(small / "a.bundle", target)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(small / "b.bundle"), str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "\nerror: " in "\n" + done.stderr and "Traceback" not in done.stderr, done.stderr
    assert target.read_bytes() == (small / "a.bundle").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.long
def test_a_disk_that_fills_up_at_the_model_card_leaves_everything_as_it_was(small: Path, tmp_path: Path) -> None:
    """The new bundle is on the disk already and only its card finds no room: bundle, card and the one before stay those of the old model."""
    target = tmp_path / f"{NAME}.safetensors"
    for name in "aba":
        shutil.copyfile(small / f"{name}.bundle", tmp_path / "candidate.tmp")
        deploy.deploy(tmp_path / "candidate.tmp", target)
    shutil.copyfile(small / "b.bundle", tmp_path / "candidate.tmp")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL_AT_THE_CARD, str(tmp_path / "candidate.tmp"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_rollback_swaps_the_two_and_back(
    finished_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = finished_world.copy(tmp_path / "rollback", "models", "report")
    target = world.root / f"models/{NAME}.safetensors"
    first = artifacts.sha256_file(target)
    with pytest.raises(MissingInputError, match="no previous model"):
        deploy.rollback(world.config())
    bundle = load_bundle(target)
    with torch.no_grad():
        bundle.model.injector.style_null.add_(1.0)
    changed = contents_of(bundle.model, bundle.texture_encoder)
    second = write_bundle(tmp_path / "second.safetensors", changed, {**bundle.header, "step": 7})
    deploy.deploy(tmp_path / "second.safetensors", target)
    assert artifacts.sha256_file(target) == second and "Step 7" in target.with_suffix(".md").read_text()
    for wanted, step in ((first, "Step 6"), (second, "Step 7")):
        assert cli.main(["export", "--rollback", *world.arguments()]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["deployed"]["sha256"] == wanted
        assert load_bundle(target).sha256 == wanted and step in target.with_suffix(".md").read_text()
        assert artifacts.read_json(world.root / "report/summary.json")["deployed"]["sha256"] == wanted
        page = (world.root / "report/index.html").read_text()
        assert page.count("changed by --rollback") == 1 and f"In production: sha256 {wanted}." in page and page.count("<h1>") == 1
    previous = deploy.previous_path(target)
    target.unlink()
    with monkeypatch.context() as without_links:
        without_links.setattr(os, "link", _no_links)
        assert deploy.rollback(world.config())["deployed"]["sha256"] == first
        assert artifacts.sha256_file(target) == first == artifacts.sha256_file(previous)
    previous.write_bytes(previous.read_bytes()[:-9])
    with pytest.raises(InvalidArtifactError):
        deploy.rollback(world.config())
    assert artifacts.sha256_file(target) == first


def test_the_model_card_says_what_the_header_says(finished_world: World) -> None:
    header = artifacts.read_header(finished_world.root / f"models/{NAME}.safetensors")
    card = (finished_world.root / f"models/{NAME}.md").read_text()
    assert "**Deployed by force**: six steps on eleven heads are no evidence" in card and "miniature weights" in card
    for heading in ("## Data", "## Figures", "## Limits", "## Licences"):
        assert heading in card
    assert f"{header['metrics']['lpips']:.3f}" in card and header["data_digest"] in card
    assert all(f"- {name}: {licence}" in card for name, licence in header["licences"].items())
    assert "left out: fid (switched off" in card


def test_what_is_deployed_is_compared_where_it_can_be(finished_world: World, tmp_path: Path) -> None:
    config = finished_world.config()
    same = load_bundle(config.paths.bundle).header["content_sha256"]
    compared, why = candidate.deployed_model(config, same)
    assert compared is None and "same weights" in why
    other = "of other weights"
    compared, why = candidate.deployed_model(config, other)
    assert compared is not None and why == ""
    compared, why = candidate.deployed_model(finished_world.config(data__resolution=256), other)
    assert compared is None and "resolution is 128, here 256" in why
    empty = finished_world.copy(tmp_path / "none")
    assert candidate.deployed_model(empty.config(), other) == (None, "")
    (tmp_path / "none/models").mkdir()
    (tmp_path / f"none/models/{NAME}.safetensors").write_bytes(b"\x80\x04K\x01.")
    compared, why = candidate.deployed_model(empty.config(), other)
    assert compared is None and "cannot be loaded" in why


def test_the_length_of_a_bundles_header_changes_no_bit_of_its_pictures(finished_world: World, tmp_path: Path) -> None:
    """Eight bytes more of header move every tensor of the file; export's comparison refused one bundle in two for it."""
    config = finished_world.config()
    found = load_bundle(config.paths.bundle)
    contents = contents_of(found.model, found.texture_encoder)
    prepared = Prepared(config.paths.processed)
    pair = pairs.draw(prepared.rows("test"), config.evaluate).transfer[0]
    scene = SceneReader(config, prepared, ThreadedMap(1))([pair])[0]
    pictures = []
    for longer in (0, 8, 16):
        write_bundle(tmp_path / "b.safetensors", contents, {**found.header, "note": "x" * longer})
        painter = Painter.of_bundle(load_bundle(tmp_path / "b.safetensors"), config)
        pictures.append(candidate.painted(painter, scene, config))
    candidate.require_equal(pictures[0], pictures[1])
    candidate.require_equal(pictures[0], pictures[2])
    with pytest.raises(InvalidArtifactError, match="paints another picture"):
        candidate.require_equal(pictures[0], pictures[1] + 1e-6)
    with pytest.raises(InvalidArtifactError, match="paints another picture"):
        candidate.require_equal(pictures[0], pictures[1] * float("nan"))


def _nan(weights: dict, header: dict) -> None:
    weights["unet.conv_in.weight"][0, 0, 0, 0] = torch.nan


def _four_channels(weights: dict, header: dict) -> None:
    weights["unet.conv_in.weight"] = weights["unet.conv_in.weight"][:, :4].clone()


def _four_channels_and_says_so(weights: dict, header: dict) -> None:
    _four_channels(weights, header)
    header["unet_config"] = {**header["unet_config"], "in_channels": 4}


def _no_injector(weights: dict, header: dict) -> None:
    for name in [name for name in weights if name.startswith("injector.")]:
        del weights[name]


def _no_network(weights: dict, header: dict) -> None:
    del header["unet_config"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_nan, r"unet.conv_in.weight.*not finite"),
        (_four_channels, r"'unet.conv_in.weight' has shape \(\d+, 4, 3, 3\), \(\d+, 9, 3, 3\) is needed"),
        (_four_channels_and_says_so, "takes 4 input channels, 9 are needed"),
        (_no_injector, r"tensors are missing, first 'injector\."),
        (_no_network, "describes no network that can be built"),
    ],
)
def test_a_broken_checkpoint_is_refused_before_it_is_measured(finished_world: World, tmp_path: Path, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    """Whole by its hashes, so that only the gate can see it: each is refused with its own reason, and what is deployed stays."""
    world = finished_world.copy(tmp_path / "broken", "checkpoints", "models", "report")
    (world.root / "processed").symlink_to(finished_world.root / "processed")
    found = checkpoints.newest(world.root / "checkpoints", PREFIX)
    assert found is not None
    weights, header = {name: tensor.clone() for name, tensor in found.weights.items()}, dict(found.header)
    change(weights, header)
    checkpoints.save(world.root / "checkpoints", f"{PREFIX}_step_99", weights=weights, optimizer=found.optimizer,
                     position={**found.position, "step": 99}, header=header)  # fmt: skip
    before = artifacts.sha256_file(world.root / f"models/{NAME}.safetensors")
    with pytest.raises(GateClosedError, match=reason):
        export(world.config(gate__force=""))
    assert artifacts.sha256_file(world.root / f"models/{NAME}.safetensors") == before


def test_force_wants_a_reason(finished_world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--force", "  ", *finished_world.arguments()]) == 2
    assert "needs a reason" in capsys.readouterr().err


def test_networks_that_no_bundle_may_hold() -> None:
    from backend.demo import architectures

    encoder = new_encoder((1, 1, 1, 1), dropout=0.0, seed=0)
    model = HairInpaintingUNet(architectures.unet())
    check_networks(model, encoder)
    model.unet.register_to_config(in_channels=4)
    with pytest.raises(InvalidArtifactError, match="4 input channels"):
        check_networks(model, encoder)


# ---- for other tools ----


def test_the_deployed_unet_is_read_by_diffusers_in_both_forms(finished_world: World, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    folder, file = tmp_path / "other/tools", tmp_path / "unet.safetensors"
    assert cli.main(["export", "--diffusers", str(folder), "--single-file", str(file), *finished_world.arguments()]) == 0
    own = load_bundle(finished_world.root / f"models/{NAME}.safetensors").model.unet
    wanted = own.state_dict()
    read = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    assert read.config.in_channels == 9
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read.state_dict().items())
    assert "## Limits" in (folder / "README.md").read_text() and (folder / "injector.safetensors").is_file()
    original = artifacts.load_tensors(file)
    assert all(name.startswith("model.diffusion_model.") for name in original)
    back = convert_ldm_unet_checkpoint(dict(original), config=dict(own.config))
    assert back.keys() == wanted.keys() and all(torch.equal(back[name], wanted[name]) for name in wanted)
    with pytest.raises(UsageError, match="exists already"):
        unet_export.write_diffusers(load_bundle(finished_world.root / f"models/{NAME}.safetensors"), folder)


def test_the_original_names_are_those_of_sdxl() -> None:
    """All 1680 tensors of SDXL's UNet, translated and translated back by diffusers; two known ones by hand."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = empty_unet(SDXL_UNET_CONFIG)
    tensors = unet.state_dict()
    names = unet_export.original_names(tensors, unet.config.layers_per_block)
    assert len(set(names.values())) == len(tensors) == 1680
    back = convert_ldm_unet_checkpoint({names[name]: tensor for name, tensor in tensors.items()}, config=dict(unet.config))
    assert back.keys() == tensors.keys() and all(back[name] is tensors[name] or back[name].shape == tensors[name].shape for name in back)
    assert names["conv_in.weight"] == "model.diffusion_model.input_blocks.0.0.weight"
    assert names["up_blocks.0.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.2.2.conv.bias"
    with pytest.raises(ValueError, match="no tensor of an SDXL UNet"):
        unet_export.original_names(["surprise.weight"], 2)
