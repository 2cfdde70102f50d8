"""A few-step LoRA of the published layout: what it does to the UNet, whom it is sampled by, and what a server that uses it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from fastapi.testclient import TestClient
from torch import nn

from backend import artifacts
from backend import weights as pretrained
from backend.app.api import create_app
from backend.config import Config, load_config
from backend.errors import InvalidArtifactError, MissingInputError, UsageError
from backend.training.models.bundle import load_bundle
from backend.training.models.stage2_unet import CHANNELS, load_unet, time_ids
from backend.tryon.conditioning import inpainting_folder
from backend.tryon.few_step import fuse, scheduler
from backend.tryon.pipeline import TryOn
from backend.tryon.sampling import scheduler_config
from backend.tryon.values import TryOnError, TryOnRequest, sampling_of
from tests.app_standin import app_config, png, serving
from tests.conftest import World
from tests.test_tryon import _portrait

# The layers that lcm-lora-sdxl changes: diffusers' train_lcm_distill_lora_sdxl.py names them as its targets. conv_in is none of them.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
           "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip
ALPHA, RANK = 2.0, 4


def lora_of(unet: nn.Module, layout: str = "kohya", size: float = 0.05) -> dict[str, torch.Tensor]:
    """A random LoRA: kohya's names with alpha, as lcm-lora-sdxl and SDXL-Lightning have them, or diffusers' own without."""
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, module in unet.named_modules():
        if not (isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(TARGETS)):
            continue
        out, inner, *kernel = module.weight.shape
        down = size * torch.randn(RANK, inner, *kernel, generator=random)
        up = size * torch.randn(out, RANK, *(1 for _ in kernel), generator=random)
        if layout == "kohya":
            prefix = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": torch.tensor(ALPHA)}
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return {name: value.half().float() for name, value in tensors.items()}


def with_lora(world: World, folder: Path, part: str, tensors: dict[str, torch.Tensor]) -> Path:
    """The world's weights and this LoRA beside them; returns ``paths.weights``."""
    folder.mkdir()
    for present in (world.root / "weights").iterdir():
        (folder / present.name).symlink_to(present)
    artifacts.save_tensors(pretrained.files(folder, part)[0], tensors, {})
    return folder


def unet_of(world: World) -> nn.Module:
    return load_unet(inpainting_folder(world.root / "weights") / "unet").eval()


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_fused_it_predicts_what_diffusers_own_loader_makes_of_it(raw_world: World, tmp_path: Path, layout: str) -> None:
    ours, theirs = unet_of(raw_world), unet_of(raw_world)
    tensors = lora_of(ours, layout)
    weights = with_lora(raw_world, tmp_path / "weights", "lcm_lora", tensors)
    generator, batch = torch.Generator().manual_seed(1), 2
    side, width, pooled = 16, ours.config.cross_attention_dim, ours.config.projection_class_embeddings_input_dim
    pooled -= 6 * ours.config.addition_time_embed_dim
    noisy = torch.randn(batch, CHANNELS, side, side, generator=generator)
    words, told = torch.randn(batch, 7, width, generator=generator), torch.randn(batch, pooled, generator=generator)

    def predicted(unet: nn.Module) -> torch.Tensor:
        added = {"text_embeds": told, "time_ids": time_ids(batch, 8 * side)}
        with torch.no_grad():
            return unet(noisy, torch.tensor([500, 20]), encoder_hidden_states=words, added_cond_kwargs=added, return_dict=False)[0]

    before, names = predicted(ours), set(ours.state_dict())
    found = fuse(ours, weights, "lcm")
    assert found.sha256 == artifacts.sha256_file(pretrained.files(weights, "lcm_lora")[0])
    assert set(ours.state_dict()) == names  # no adapter, no second copy
    loader = StableDiffusionXLInpaintPipeline.load_lora_into_unet
    loaded, alphas = StableDiffusionXLInpaintPipeline.lora_state_dict(dict(tensors), unet_config=theirs.config)
    loader(loaded, alphas, theirs)
    wanted = predicted(theirs)
    assert (wanted - before).abs().mean() > 0.01 * before.abs().mean()
    torch.testing.assert_close(predicted(ours), wanted, rtol=1e-4, atol=1e-4)


def _other_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"] = torch.zeros(4, 8)


def _halved(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("lora_up.weight"))]


def _wider(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("to_q.lora_down.weight"))
    tensors[name] = torch.zeros(RANK, tensors[name].shape[1] + 1)


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(name for name in tensors if name.endswith("conv1.lora_down.weight"))].fill_(torch.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_other_layer, "belongs to no layer"), (_halved, "lacks one of its two factors"), (_wider, "the UNet's layer has"),
     (_infinite, "not finite")],
)  # fmt: skip
def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(raw_world: World, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    unet = unet_of(raw_world)
    tensors = lora_of(unet)
    change(tensors)
    weights = with_lora(raw_world, tmp_path / "weights", "lightning_lora", tensors)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(InvalidArtifactError, match=message):
        fuse(unet, weights, "lightning")
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_an_absent_lora_is_named_with_where_to_get_it(finished_world: World) -> None:
    config = finished_world.config(sample__few_step="lcm")
    assert "lcm_lora" in pretrained.needed(config) and "lightning_lora" not in pretrained.needed(config)
    with pytest.raises(MissingInputError, match=r"lcm_lora: pytorch_lora_weights\.safetensors missing"):
        TryOn.load(config)


def test_each_kind_is_sampled_as_it_was_distilled(raw_world: World) -> None:
    """The published timesteps: lcm 999, 759, 499, 259 of its 50; Lightning the last of each quarter, 999, 749, 499, 249."""
    base = scheduler_config(inpainting_folder(raw_world.root / "weights"))
    for kind, wanted in (("lcm", [999, 759, 499, 259]), ("lightning", [999, 749, 499, 249])):
        made = scheduler(base, kind)  # type: ignore[arg-type]
        made.set_timesteps(4)
        assert [int(step) for step in made.timesteps] == wanted, kind


@pytest.fixture(scope="module")
def few(finished_world: World, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A server's configuration with a small LoRA of LCM's layout."""
    folder = tmp_path_factory.mktemp("few")
    weights = with_lora(finished_world, folder / "weights", "lcm_lora", lora_of(unet_of(finished_world)))
    return finished_world.config(sample__few_step="lcm", paths__weights=weights, paths__jobs=folder / "jobs")


def test_a_few_step_server_paints_in_its_steps_and_says_with_what(few: Config) -> None:
    bundle = load_bundle(few.paths.bundle, few.paths.weights)
    tryon = TryOn.load(few)
    photo, steps = _portrait(7), []
    request = TryOnRequest(photo, _portrait(11), seed=3)
    first = tryon.run(request, on_step=lambda done, total: steps.append((done, total)))
    torch.manual_seed(17)  # LCM draws noise between its steps: from the job's seed, not from the process's generator
    assert np.array_equal(first.image, tryon.run(request).image)
    assert not np.array_equal(first.image, tryon.run(TryOnRequest(photo, _portrait(11), seed=4)).image)
    assert steps == [(n, 4) for n in (1, 2, 3, 4)]
    used = {"kind": "lcm", "sha256": artifacts.sha256_file(pretrained.files(few.paths.weights, "lcm_lora")[0])}
    assert first.info["few_step"] == used and first.info["bundle_sha256"] == bundle.sha256
    assert (first.info["steps"], first.info["guidance"]) == (4, 1.0)
    assert tryon.header["sampling"] == {"steps": 4, "guidance": 1.0, "few_step": used}
    calls = []
    tryon._painter.sampler.model.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    tryon.run(request)
    assert calls == [1] * 4  # no second batch row for guidance


def test_what_a_distilled_sampler_cannot_do_is_refused(few: Config) -> None:
    lcm = few.sample
    lightning = lcm.model_copy(update={"few_step": "lightning"})
    assert sampling_of(lcm, None, None, 1.0) == sampling_of(lightning, None, None, 1.0) == (4, 1.0)
    assert sampling_of(lcm, 8, 2.0, 1.0) == (8, 2.0)
    plain = lcm.model_copy(update={"few_step": "none"})
    assert sampling_of(plain, 30, 7.0, 0.5) == (30, 7.0) and sampling_of(plain, None, None, 1.0) == (plain.steps, plain.guidance)
    for settings, asked in ((lcm, (9, None, 1.0)), (lcm, (None, 2.5, 1.0)), (lcm, (None, None, 0.9)), (lightning, (8, None, 1.0)),
                            (lightning, (None, 1.5, 1.0))):  # fmt: skip
        with pytest.raises(TryOnError) as caught:
            sampling_of(settings, *asked)
        assert caught.value.code == "few_step" and "sample.few_step=none" in caught.value.hint
    for wrong in (["sample.few_step=lightning", "sample.few_steps=8"], ["sample.offload=true", "sample.compile=true"]):
        with pytest.raises(UsageError):
            load_config(overrides=wrong)


def test_it_is_refused_over_http_before_it_waits(tmp_path: Path) -> None:
    base = app_config(tmp_path)
    config = base.model_copy(update={"sample": base.sample.model_copy(update={"few_step": "lcm"})})
    with serving(config) as live:
        for asked in ({"strength": "0.5"}, {"steps": "30"}, {"guidance": "5"}):
            answer = live.client.post("/api/v1/jobs", files={"target": png()}, data={"prompt": "bob", **asked})
            assert (answer.status_code, answer.json()["code"]) == (422, "few_step"), asked
        assert live.client.post("/api/v1/jobs", files={"target": png()}, data={"prompt": "bob", "steps": "8"}).status_code == 202


@pytest.mark.long
def test_the_models_of_a_few_step_server_are_told(few: Config) -> None:
    """A whole server with its own process for the model: what it says it loaded comes through the pipe."""
    with TestClient(create_app(few), base_url="http://localhost") as client:
        while client.get("/readyz").status_code != 200:
            pass
        told = client.get("/api/v1/models").json()
    assert told["sampling"]["few_step"]["kind"] == "lcm" and len(told["sampling"]["few_step"]["sha256"]) == 64
    assert "lcm_lora" in told["weights"]
