"""Each loader against the layout in which its part is published (tests/published.py): names, configurations, preprocessing, and the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from backend import weights, weights_fetch
from backend.config import EvaluateConfig
from backend.errors import InvalidArtifactError
from backend.training.data_processing.prompts import all_prompt_words
from backend.training.image_networks import MeasuringNetworks
from backend.training.models.perceptual import load_perceptual
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import SDXL_UNET_CONFIG, empty_unet, load_unet, unet_config
from backend.training.models.texture_encoder import new_encoder
from backend.training.training_face import FaceAnalyzer
from backend.tryon import conditioning, sampling
from backend.tryon.segmentation import HairParser
from backend.tryon.steering import load_controlnet
from tests import published

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The inpainting folder and the networks whose weights lie in it."""
    root = tmp_path_factory.mktemp("published")
    networks = published.write_inpainting(root)
    return weights.folder(root, "inpainting"), networks


def _names(path: Path) -> set[str]:
    return set(load_file(path))


def _drop(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


# ---- SDXL inpainting ----


def test_the_unet_is_read_from_sdxl_s_1680_names_and_its_configuration(base: tuple[Path, dict[str, Any]]) -> None:
    folder, networks = base
    with torch.device("meta"):
        full = empty_unet(SDXL_UNET_CONFIG)
    assert len(published.unet_names()) == 1680
    assert _names(folder / "unet/diffusion_pytorch_model.safetensors") == set(full.state_dict()) == published.unet_names()
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    assert shapes == published.unet_shapes()
    assert sum(value.numel() for value in full.parameters()) == 2_567_478_084
    unet = load_unet(folder / "unet", torch.float32)
    written = networks["unet"].state_dict()
    assert all(torch.equal(value, written[name]) for name, value in unet.state_dict().items())
    again = empty_unet(json.loads(json.dumps(unet_config(unet))))  # as a bundle's header carries it
    assert again.state_dict().keys() == unet.state_dict().keys()
    assert load_unet(folder / "unet", torch.bfloat16).dtype == torch.bfloat16


def test_the_vae_is_read_from_sdxl_s_248_names_and_never_in_float16(base: tuple[Path, dict[str, Any]]) -> None:
    folder, networks = base
    assert len(published.vae_names()) == 248
    assert _names(folder / "vae/diffusion_pytorch_model.safetensors") == published.vae_names()
    vae = conditioning.load_vae(folder, device=CPU, dtype=torch.float32)
    assert vae.config.scaling_factor == 0.13025 and vae.config.force_upcast
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, _ = conditioning.encode_latents(vae, picture)
    with torch.no_grad():
        assert torch.allclose(mean, networks["vae"].encode(picture).latent_dist.mean * 0.13025, atol=1e-6)
    with pytest.raises(ValueError, match="overflows in float16"):
        conditioning.load_vae(folder, device=CPU, dtype=torch.float16)


def test_an_infinite_latent_is_refused(base: tuple[Path, dict[str, Any]]) -> None:
    vae = conditioning.load_vae(base[0], device=CPU, dtype=torch.float32)
    with torch.no_grad():
        vae.quant_conv.bias[0] = torch.inf
    with pytest.raises(InvalidArtifactError, match="non-finite latents"):
        conditioning.encode_latents(vae, torch.zeros(1, 3, 64, 64))


def test_both_text_encoders_are_read_from_the_old_names_and_pool_where_the_text_ends(base: tuple[Path, dict[str, Any]]) -> None:
    folder, networks = base
    for name in ("text_encoder", "text_encoder_2"):
        assert _names(folder / name / "model.safetensors") == published.text_names(2, projection=name.endswith("_2"))
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    words = sorted(word for word in all_prompt_words() if word.isalpha())[:5]
    hidden, pooled = conditioning.TextEncoders(folder, device=CPU, dtype=torch.float32).encode([" ".join(words), ""])
    assert hidden.shape == (2, 77, 2 * published.TEXT_WIDTH) and pooled.shape == (2, published.TEXT_WIDTH)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    inside = [start, *(vocabulary[f"{word}</w>"] for word in words), end]
    for name, column, pad in (("text_encoder", 0, end), ("text_encoder_2", 1, vocabulary["!"])):
        ids = torch.tensor([inside + [pad] * (77 - len(inside))])
        layer = _Output(next(module for path, module in networks[name].named_modules() if path.endswith("encoder.layers.0")))
        with torch.no_grad():
            last = (networks[name].text_model if column else networks[name])(ids).last_hidden_state[0]
        # two layers: the next to last is the first
        assert torch.allclose(hidden[0, :, column * published.TEXT_WIDTH :][:, : published.TEXT_WIDTH], layer.value[0], atol=1e-5)
        if column:  # pooled where the text ends, not where id 2 would stand
            with torch.no_grad():
                assert torch.allclose(pooled[0], networks[name].text_projection(last[len(inside) - 1]), atol=1e-5)
    assert not torch.allclose(pooled[0], pooled[1])


class _Output:
    """Remembers what a module has given last."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.value = torch.empty(0)
        module.register_forward_hook(self._keep)

    def _keep(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output


def test_sdxl_s_schedule_predicts_noise_and_leads_its_steps(base: tuple[Path, dict[str, Any]]) -> None:
    from diffusers import EulerDiscreteScheduler

    config = sampling.scheduler_config(base[0])
    schedule = NoiseSchedule(config)
    assert schedule.kind == "epsilon" and schedule.steps == 1000
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # "scaled_linear"
    assert schedule.alpha(torch.tensor([0, 999])).numpy() == pytest.approx(np.cumprod(1 - betas)[[0, 999]], rel=1e-4)
    euler = EulerDiscreteScheduler.from_config(config)
    euler.set_timesteps(30)
    assert euler.timesteps.tolist() == [33 * step + 1 for step in reversed(range(30))]


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "mid_block.attentions.0.transformer_blocks.9.attn2.to_k.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
        ("text_encoder/model.safetensors", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder_2/model.safetensors", "text_projection.weight"),
    ],
)
def test_a_file_that_does_not_fill_its_network_is_refused_not_filled_with_random_numbers(
    base: tuple[Path, dict[str, Any]], tmp_path: Path, file: str, tensor: str
) -> None:
    folder = tmp_path / "inpainting"
    shutil.copytree(base[0], folder)
    _drop(folder / file, tensor)
    with pytest.raises(InvalidArtifactError, match="lacks 1 tensors"):
        load_unet(folder / "unet")
        conditioning.load_vae(folder, device=CPU, dtype=torch.float32)
        conditioning.TextEncoders(folder, device=CPU, dtype=torch.float32)


def test_a_controlnet_of_sdxl_in_diffusers_layout(tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    keys = ("addition_embed_type", "addition_time_embed_dim", "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types",
            "layers_per_block", "projection_class_embeddings_input_dim", "transformer_layers_per_block", "use_linear_projection")  # fmt: skip
    model = ControlNetModel(in_channels=4, **{key: published.UNET_CONFIG[key] for key in keys})
    model.save_pretrained(tmp_path / "controlnet")
    names = _names(tmp_path / "controlnet/diffusion_pytorch_model.safetensors")
    own = {f"controlnet_cond_embedding.{part}" for part in ("conv_in", "conv_out", *(f"blocks.{n}" for n in range(6)))}
    own |= {f"controlnet_down_blocks.{n}" for n in range(9)} | {"controlnet_mid_block"}
    shared = {name for name in published.unet_names() if not name.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
    assert names == shared | {f"{name}.{kind}" for name in own for kind in ("weight", "bias")}
    assert load_controlnet(tmp_path, device=CPU, dtype=torch.float32).config.in_channels == 4
    _drop(tmp_path / "controlnet/diffusion_pytorch_model.safetensors", "controlnet_mid_block.weight")
    with pytest.raises(InvalidArtifactError, match="the ControlNet"):
        load_controlnet(tmp_path, device=CPU, dtype=torch.float32)


# ---- the face parser ----


def test_the_parser_names_preprocessing_and_classes(tmp_path: Path) -> None:
    published.write_parser(tmp_path)
    path = weights.folder(tmp_path, "face_parser") / "model.safetensors"
    assert _names(path) == published.parser_names([1, 2, 1, 1], [8, 4, 2, 1])
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    wanted = (picture / 255.0 - published.IMAGENET["image_mean"]) / published.IMAGENET["image_std"]  # at 512 px nothing is resized
    for bias, value in ((100.0, 255), (-100.0, 0)):
        tensors = load_file(path)
        tensors["decode_head.classifier.bias"][published.FACE_PARTS.index("hair")] = bias
        save_file(tensors, path, {"format": "pt"})
        parser = HairParser(tmp_path, device=CPU)
        seen: dict[str, torch.Tensor] = {}
        parser._model.register_forward_pre_hook(lambda _, __, given, seen=seen: seen.update(given), with_kwargs=True)
        assert np.array_equal(parser.hair(picture), np.full((512, 512), value, np.uint8))
        assert torch.allclose(seen["pixel_values"][0].permute(1, 2, 0), torch.from_numpy(wanted).float(), atol=1e-5)


def test_a_parser_with_renamed_classes_is_refused_where_none_is_hair(tmp_path: Path) -> None:
    published.write_parser(tmp_path)
    path = weights.folder(tmp_path, "face_parser") / "config.json"
    config = json.loads(path.read_text())
    config["id2label"]["13"], config["id2label"]["17"] = config["id2label"]["17"], "HAIR"  # another order: the name decides
    path.write_text(json.dumps(config))
    assert HairParser(tmp_path, device=CPU)._hair == 17
    config["id2label"]["17"] = "fur"
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidArtifactError, match="0 classes named 'hair'"):
        HairParser(tmp_path, device=CPU)


def test_a_parser_without_its_head_is_refused(tmp_path: Path) -> None:
    published.write_parser(tmp_path)
    _drop(weights.folder(tmp_path, "face_parser") / "model.safetensors", "decode_head.classifier.weight")
    with pytest.raises(InvalidArtifactError, match=r"decode_head\.classifier\.weight"):
        HairParser(tmp_path, device=CPU)


# ---- the faces: ONNX graphs that answer with what they were given ----


def _onnx(path: Path, nodes: list[Any], constants: dict[str, np.ndarray], shape: list[Any], outputs: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        nodes,
        "published",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, form) for name, form in outputs.items()],
        [
            numpy_helper.from_array(value.astype(np.float32) if value.dtype != np.int64 else value, name)
            for name, value in constants.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def _detector(path: Path) -> None:
    """YOLOv8-face's three outputs (1, 80, 80/40/20 squared): 64 logits of box distances, the class logit, five points with visibility. One face
    is planted at stride 16; its logit rises above 0.5 only where the picture's middle is red in the input's first channel."""
    constants: dict[str, np.ndarray] = {}
    for number, side in enumerate((80, 40, 20)):
        planes = np.zeros((1, 80, side, side))
        planes[0, 64] = -20
        if side == 40:
            for bins, distance in enumerate((2, 3, 4, 5)):  # left, top, right, bottom in strides
                planes[0, 16 * bins + distance, 20, 10] = 40
            planes[0, 64, 20, 10] = -1
            for point, (x, y) in enumerate(((-0.5, -0.5), (0.5, -0.5), (0, 0), (-0.5, 0.5), (0.5, 0.5))):
                planes[0, 65 + 3 * point : 67 + 3 * point, 20, 10] = (x, y)
        constants[f"planes{number}"] = planes
    redness = np.zeros((1, 3, 640, 640))
    redness[0, 0, 320, 320], redness[0, 2, 320, 320] = 4, -4  # of RGB in 0..1: +4 for red, -4 for blue
    where = np.zeros((1, 80, 40, 40))
    where[0, 64, 20, 10] = 1
    constants |= {"redness": redness, "where": where, "axes": np.array([0, 1, 2, 3], np.int64)}
    nodes = [
        helper.make_node("Mul", ["input", "redness"], ["weighed"]),
        helper.make_node("ReduceSum", ["weighed", "axes"], ["red"], keepdims=1),
        helper.make_node("Mul", ["red", "where"], ["rise"]),
        helper.make_node("Identity", ["planes0"], ["output0"]),
        helper.make_node("Add", ["planes1", "rise"], ["output1"]),
        helper.make_node("Identity", ["planes2"], ["output2"]),
    ]
    sizes = {f"output{n}": [1, 80, side, side] for n, side in enumerate((80, 40, 20))}
    _onnx(path, nodes, constants, [1, 3, 640, 640], sizes)


def _recogniser(path: Path) -> None:
    """112 x 112 to (batch, 512): the means of the input's three channels, each over a hundred, then zeros."""
    matrix = np.zeros((3, 512))
    matrix[np.arange(3), np.arange(3)] = 1
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "matrix"], ["embedding"]),
    ]
    _onnx(path, nodes, {"matrix": matrix}, ["batch", 3, 112, 112], {"embedding": ["batch", 512]})


def test_yolo_face_takes_rgb_in_a_grey_letterbox_and_its_boxes_and_points_are_decoded(tmp_path: Path) -> None:
    _detector(tmp_path / "face/yolov8n-face.onnx")
    _recogniser(tmp_path / "face/adaface_ir_18.onnx")
    analyzer = FaceAnalyzer(tmp_path)
    red = np.zeros((320, 640, 3), np.uint8)
    red[..., 0] = 255
    (face,) = analyzer.detect(red)
    # cell (10, 20) of stride 16, its middle at 168, 328; distances 2, 3, 4, 5 strides; the frame starts 160 px below the letterbox's top
    assert face.box == pytest.approx((168 - 32, 328 - 48 - 160, 168 + 64, 328 + 80 - 160), abs=0.5)
    assert face.confidence == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-4)
    corner = np.array([[-1, -1], [1, -1], [0, 0], [-1, 1], [1, 1]], np.float32)  # (2 * value + cell) * stride
    assert np.allclose(face.landmarks, (corner + np.array([10, 20])) * 16 - np.array([0, 160]), atol=0.5)
    assert analyzer.detect(np.ascontiguousarray(red[..., ::-1])) == []  # blue: were channels swapped on the way, this one would be found


@pytest.mark.parametrize(
    ("kind", "file", "order"), [("adaface", "adaface_ir_18.onnx", (2, 1, 0)), ("insightface", "w600k_r50.onnx", (0, 1, 2))]
)
def test_adaface_takes_bgr_and_insightface_rgb_both_from_minus_one_to_one(
    tmp_path: Path, kind: Any, file: str, order: tuple[int, ...]
) -> None:
    _detector(tmp_path / "face/yolov8n-face.onnx")
    _recogniser(tmp_path / "face" / file)
    colour = np.array([255, 153, 51], np.uint8)  # RGB: 1, 0.2 and -0.6 after (x - 127.5) / 127.5
    picture = np.broadcast_to(colour, (200, 200, 3)).copy()
    points = np.array([[80, 90], [120, 90], [100, 110], [85, 130], [115, 130]], np.float32)
    embedding = FaceAnalyzer(tmp_path, kind).embed(picture, points)
    wanted = np.array([1.0, 0.2, -0.6])[list(order)]
    assert embedding[:3] == pytest.approx(wanted / np.linalg.norm(wanted), abs=0.01) and not embedding[3:].any()


def test_a_network_of_another_kind_is_refused(tmp_path: Path) -> None:
    _detector(tmp_path / "face/yolov8n-face.onnx")
    _detector(tmp_path / "face/adaface_ir_18.onnx")  # three outputs where one is expected
    with pytest.raises(InvalidArtifactError, match="cannot be loaded"):
        FaceAnalyzer(tmp_path)


# ---- ResNet50, VGG16 with LPIPS, CLIP, DINOv2 ----


def test_resnet50_with_its_classifier_starts_stage_1(tmp_path: Path) -> None:
    network = published.write_resnet(tmp_path)
    path = weights.folder(tmp_path, "resnet") / "model.safetensors"
    assert {"fc.weight", "fc.bias", "layer4.2.bn3.num_batches_tracked", "layer1.0.downsample.0.weight"} <= _names(path)
    encoder = new_encoder((3, 4, 6, 3), dropout=0.0, seed=0).eval()
    encoder.load_backbone(path)
    pictures = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(published.IMAGENET[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(encoder.encode(pictures), network((pictures - mean) / std), rtol=1e-4, atol=1e-5)


def test_vgg16_of_timm_and_the_packaged_heads_are_lpips(tmp_path: Path) -> None:
    import lpips

    tensors = published.write_vgg(tmp_path)
    assert {name.split(".")[0] for name in tensors} == {"features", "pre_logits", "head"}
    weights_fetch.write_lpips_heads(tmp_path, ["perceptual"])
    network, name = load_perceptual(tmp_path)
    assert name == "vgg16"
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()  # its own heads, VGG drawn: ours is put in
    slices = [module for n in range(1, 6) for module in getattr(reference.net, f"slice{n}").named_children()]
    with torch.no_grad():
        for number, layer in slices:
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.copy_(tensors[f"features.{number}.weight"])
                layer.bias.copy_(tensors[f"features.{number}.bias"])
        first, second = torch.rand(2, 1, 3, 64, 64) * 2 - 1
        assert network.lpips(first, second).item() == pytest.approx(reference(first, second).item(), rel=1e-4)


def test_clip_s_picture_half_comes_out_of_the_one_file_with_its_own_preprocessing(tmp_path: Path) -> None:
    network = published.write_clip(tmp_path)
    path = weights.folder(tmp_path, "clip_image") / "model.safetensors"
    halves = published.vision_names(2) | published.text_names(2, projection=True)
    ids = {f"{half}.embeddings.position_ids" for half in ("text_model", "vision_model")}
    assert _names(path) == halves | ids | {"logit_scale"}
    found = MeasuringNetworks(tmp_path, EvaluateConfig(networks=("clip_image",)), CPU).clip
    assert found is not None
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    pixels = (picture / 255.0 - published.CLIP_STATISTICS["image_mean"]) / published.CLIP_STATISTICS["image_std"]
    with torch.no_grad():
        wanted = network.visual_projection(
            network.vision_model(pixel_values=torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).pooler_output
        )
    assert np.allclose(found.embed([picture])[0], wanted[0].numpy(), atol=1e-4)
    _drop(path, "visual_projection.weight")
    with pytest.raises(InvalidArtifactError, match="lacks 1 tensors"):
        MeasuringNetworks(tmp_path, EvaluateConfig(networks=("clip_image",)), CPU)


def test_dinov2_is_read_from_its_own_names_at_224_of_256(tmp_path: Path) -> None:
    network = published.write_dino(tmp_path)
    assert _names(weights.folder(tmp_path, "dino") / "model.safetensors") == published.dino_names(2)
    found = MeasuringNetworks(tmp_path, EvaluateConfig(networks=("dino",)), CPU).dino
    assert found is not None
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    middle = (picture[16:240, 16:240] / 255.0 - published.IMAGENET["image_mean"]) / published.IMAGENET["image_std"]
    with torch.no_grad():
        wanted = network(pixel_values=torch.from_numpy(middle).float().permute(2, 0, 1)[None]).pooler_output
    assert np.allclose(found.embed([picture])[0], wanted[0].numpy(), atol=1e-4)
