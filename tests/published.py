"""The pretrained parts as their repositories publish them: files, tensor names, configurations and preprocessing are the real ones, only widths
and vocabularies are small. Written from the repositories' own configuration files and from the original code's module names, not from what the
libraries write today: old names and old settings are what a download brings.

Sources: diffusers/stable-diffusion-xl-1.0-inpainting-0.1 (unet, vae, scheduler, both text encoders and tokenizers), jonathandinu/face-parsing,
sentence-transformers/clip-ViT-B-32, facebook/dinov2-base, timm/resnet50.tv_in1k and timm/vgg16.tv_in1k (torchvision's names).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from backend import weights

TEXT_WIDTH, TIME_WIDTH = 32, 32
UNET_WIDTHS, VAE_WIDTHS = [32, 64, 128], [32, 64, 128, 128]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP_STATISTICS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
FACE_PARTS = ["background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip", "hair",
              "hat", "ear_r", "neck_l", "neck", "cloth"]  # fmt: skip


# ---- tensor names ----


def _both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def _resnet(path: str, *, timed: bool, shortcut: bool) -> set[str]:
    parts = ["norm1", "conv1", "norm2", "conv2", *(["time_emb_proj"] if timed else []), *(["conv_shortcut"] if shortcut else [])]
    return _both(*(f"{path}.{part}" for part in parts))


def _transformer(path: str, depth: int) -> set[str]:
    names = _both(f"{path}.norm", f"{path}.proj_in", f"{path}.proj_out")
    for block in (f"{path}.transformer_blocks.{number}" for number in range(depth)):
        names |= _both(*(f"{block}.{part}" for part in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")))
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            names |= _both(f"{attention}.to_out.0") | {f"{attention}.to_{one}.weight" for one in "qkv"}
    return names


def unet_names() -> set[str]:
    """The 1,680 tensors of SDXL's UNet: blocks of 0, 2 and 10 transformer layers."""
    depths = (0, 2, 10)
    names = _both(
        "conv_in", "conv_norm_out", "conv_out", *(f"{one}.linear_{n}" for one in ("time_embedding", "add_embedding") for n in (1, 2))
    )
    for block, depth in enumerate(depths):
        for layer in range(2):
            names |= _resnet(f"down_blocks.{block}.resnets.{layer}", timed=True, shortcut=block > 0 and layer == 0)
            names |= _transformer(f"down_blocks.{block}.attentions.{layer}", depth) if depth else set()
        names |= _both(f"down_blocks.{block}.downsamplers.0.conv") if block < 2 else set()
    for layer in range(2):
        names |= _resnet(f"mid_block.resnets.{layer}", timed=True, shortcut=False)
    names |= _transformer("mid_block.attentions.0", depths[-1])
    for block, depth in enumerate(reversed(depths)):
        for layer in range(3):
            names |= _resnet(f"up_blocks.{block}.resnets.{layer}", timed=True, shortcut=True)
            names |= _transformer(f"up_blocks.{block}.attentions.{layer}", depth) if depth else set()
        names |= _both(f"up_blocks.{block}.upsamplers.0.conv") if block < 2 else set()
    return names


def unet_shapes() -> dict[str, tuple[int, ...]]:
    """The shape of each of those tensors, by what the layer does: SDXL's widths, 2048 of the text, 9 input channels."""
    inside = {"down_blocks.0": ((320, 320), (320, 320)), "down_blocks.1": ((320, 640), (640, 640)), "down_blocks.2": ((640, 1280), (1280, 1280)),
              "mid_block": ((1280, 1280), (1280, 1280)), "up_blocks.0": ((2560, 1280), (2560, 1280), (1920, 1280)),
              "up_blocks.1": ((1920, 640), (1280, 640), (960, 640)), "up_blocks.2": ((960, 320), (640, 320), (640, 320))}  # fmt: skip
    outside = {"conv_in": (320, 9, 3, 3), "conv_out": (4, 320, 3, 3), "conv_norm_out": (320,), "time_embedding.linear_1": (1280, 320),
               "time_embedding.linear_2": (1280, 1280), "add_embedding.linear_1": (1280, 2816), "add_embedding.linear_2": (1280, 1280)}  # fmt: skip

    def weight(layer: str) -> tuple[int, ...]:
        if layer in outside:
            return outside[layer]
        block = next(name for name in inside if layer.startswith(name))
        wide = inside[block][-1][1]
        kind = layer.rsplit(".", maxsplit=1)[-1]
        if "resnets" in layer:
            given, made = inside[block][int(layer.split("resnets.")[1].split(".")[0])]
            return {"norm1": (given,), "norm2": (made,), "conv1": (made, given, 3, 3), "conv2": (made, made, 3, 3), "time_emb_proj": (made, 1280),
                    "conv_shortcut": (made, given, 1, 1)}[kind]  # fmt: skip
        if "samplers" in layer:
            return wide, wide, 3, 3
        if "norm" in kind:
            return (wide,)
        if ".ff." in layer:
            return (8 * wide, wide) if kind == "proj" else (wide, 4 * wide)
        return (wide, 2048) if "attn2.to_k" in layer or "attn2.to_v" in layer else (wide, wide)

    return {
        name: weight(name.removesuffix(".weight")) if name.endswith(".weight") else weight(name.removesuffix(".bias"))[:1]
        for name in unet_names()
    }


def vae_names() -> set[str]:
    """The 248 tensors of SDXL's VAE."""
    names = _both("quant_conv", "post_quant_conv")
    for half, layers, wider in (("encoder", 2, (1, 2)), ("decoder", 3, (2, 3))):
        names |= _both(*(f"{half}.{part}" for part in ("conv_in", "conv_norm_out", "conv_out")))
        side, sampler = ("down", "downsamplers") if half == "encoder" else ("up", "upsamplers")
        for block in range(4):
            for layer in range(layers):
                names |= _resnet(f"{half}.{side}_blocks.{block}.resnets.{layer}", timed=False, shortcut=block in wider and layer == 0)
            names |= _both(f"{half}.{side}_blocks.{block}.{sampler}.0.conv") if block < 3 else set()
        for layer in range(2):
            names |= _resnet(f"{half}.mid_block.resnets.{layer}", timed=False, shortcut=False)
        names |= _both(*(f"{half}.mid_block.attentions.0.{part}" for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0")))
    return names


def _clip_layers(path: str, layers: int) -> set[str]:
    parts = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")))
    return _both(*(f"{path}.encoder.layers.{number}.{part}" for number in range(layers) for part in parts))


def text_names(layers: int, *, projection: bool) -> set[str]:
    """CLIP's text half; SDXL's second encoder has a projection."""
    embeddings = {f"text_model.embeddings.{one}_embedding.weight" for one in ("token", "position")}
    last = _both("text_model.final_layer_norm") | ({"text_projection.weight"} if projection else set())
    return embeddings | _clip_layers("text_model", layers) | last


def vision_names(layers: int) -> set[str]:
    """CLIP's picture half, ``pre_layrnorm`` as its authors spell it."""
    embeddings = {"class_embedding", "patch_embedding.weight", "position_embedding.weight"}
    around = _both("vision_model.pre_layrnorm", "vision_model.post_layernorm") | {"visual_projection.weight"}
    return {f"vision_model.embeddings.{one}" for one in embeddings} | _clip_layers("vision_model", layers) | around


def dino_names(layers: int) -> set[str]:
    """DINOv2's."""
    names = {f"embeddings.{one}" for one in ("cls_token", "mask_token", "position_embeddings")}
    names |= _both("embeddings.patch_embeddings.projection", "layernorm")
    parts = (
        "norm1",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
        "attention.output.dense",
        *(f"attention.attention.{one}" for one in ("query", "key", "value")),
    )
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        names |= _both(*(f"{layer}.{part}" for part in parts)) | {f"{layer}.layer_scale{n}.lambda1" for n in (1, 2)}
    return names


def parser_names(depths: Iterable[int], reductions: Iterable[int]) -> set[str]:
    """SegFormer's, with the strided convolution of the attention where the reduction is above 1."""
    names = _both(*(f"decode_head.{part}" for part in ("batch_norm", "classifier", *(f"linear_c.{n}.proj" for n in range(4)))))
    names |= {
        "decode_head.linear_fuse.weight",
        *(f"decode_head.batch_norm.{one}" for one in ("running_mean", "running_var", "num_batches_tracked")),
    }
    for stage, (depth, reduction) in enumerate(zip(depths, reductions, strict=True)):
        encoder = "segformer.encoder"
        names |= _both(
            f"{encoder}.patch_embeddings.{stage}.proj", f"{encoder}.patch_embeddings.{stage}.layer_norm", f"{encoder}.layer_norm.{stage}"
        )
        parts = ["layer_norm_1", "layer_norm_2", "mlp.dense1", "mlp.dense2", "mlp.dwconv.dwconv", "attention.output.dense"]
        parts += [f"attention.self.{one}" for one in ("query", "key", "value", *(("sr", "layer_norm") if reduction > 1 else ()))]
        names |= _both(*(f"{encoder}.block.{stage}.{number}.{part}" for number in range(depth) for part in parts))
    return names


# ---- configurations ----

UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.21.0.dev0", "_name_or_path": "valhalla/sdxl-inpaint-ema", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": TIME_WIDTH,
    "attention_head_dim": [1, 2, 4], "attention_type": "default", "block_out_channels": UNET_WIDTHS, "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_dim": 2 * TEXT_WIDTH, "cross_attention_norm": None, "decay": 0.9999,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "in_channels": 9, "inv_gamma": 1.0, "layers_per_block": 2, "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "min_decay": 0.0, "norm_eps": 1e-05, "norm_num_groups": 32, "num_attention_heads": None,
    "num_class_embeds": None, "only_cross_attention": False, "optimization_step": 37000, "out_channels": 4, "power": 0.6666666666666666,
    "projection_class_embeddings_input_dim": 6 * TIME_WIDTH + TEXT_WIDTH, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None, "update_after_step": 0,
    "use_ema_warmup": False, "use_linear_projection": True,
}  # fmt: skip
EMA_SETTINGS = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}  # of no class
VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.21.0.dev0", "act_fn": "silu", "block_out_channels": VAE_WIDTHS,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.21.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading",
    "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip


def text_config(kind: str, vocabulary: int) -> dict[str, Any]:
    """SDXL's text encoders say that text ends with id 2, which it does not; the pooled text is where the highest id stands."""
    second = kind == "CLIPTextModelWithProjection"
    return {
        "architectures": [kind], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "gelu" if second else "quick_gelu", "hidden_size": TEXT_WIDTH, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": 4 * TEXT_WIDTH, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 1, "projection_dim": TEXT_WIDTH, "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0", "vocab_size": vocabulary,
    }  # fmt: skip


def tokenizer_config(pad: str) -> dict[str, Any]:
    """The older form: tokens as objects with ``__type``."""
    start, end = ({"__type": "AddedToken", "content": f"<|{which}oftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
                  for which in ("start", "end"))  # fmt: skip
    return {
        "add_prefix_space": False, "bos_token": start, "clean_up_tokenization_spaces": True, "do_lower_case": True, "eos_token": end,
        "errors": "replace", "model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer", "unk_token": end,
    }  # fmt: skip


PARSER_PREPROCESSING = {
    "do_normalize": True, "do_reduce_labels": False, "do_rescale": True, "do_resize": True, "image_processor_type": "SegformerFeatureExtractor",
    "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"height": 512, "width": 512}, **IMAGENET,
}  # fmt: skip
CLIP_PREPROCESSING = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
    "resample": 3, "size": 224, **CLIP_STATISTICS,
}  # fmt: skip
DINO_PREPROCESSING = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_processor_type": "BitImageProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256}, **IMAGENET,
}  # fmt: skip


# ---- files ----


def write_inpainting(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """``stable-diffusion/sd_xl_inpainting`` below ``folder``; returns the networks whose weights it holds, by folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    base = weights.folder(folder, "inpainting")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = {key: value for key, value in UNET_CONFIG.items() if not key.startswith("_") and key not in EMA_SETTINGS}
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel(**own),
            "vae": AutoencoderKL(**{key: value for key, value in VAE_CONFIG.items() if not key.startswith("_")}),
        }
        size = _write_tokenizers(base)
        for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")):
            own = {key: value for key, value in text_config(kind.__name__, size).items() if key != "torch_dtype"}  # the files are float32
            networks[name] = kind(CLIPTextConfig(**own))
    configs = {"unet": UNET_CONFIG, "vae": VAE_CONFIG} | {
        name: text_config(type(networks[name]).__name__, size) for name in ("text_encoder", "text_encoder_2")
    }
    for name, network in networks.items():
        network.eval()
        tensors = {_with_prefix(key, name): value for key, value in network.state_dict().items() if not key.endswith("position_ids")}
        file = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        _write(base / name / f"{file}.safetensors", tensors)
        _write_json(base / name / "config.json", configs[name])
    _write_json(base / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    index = {"scheduler": ["diffusers", "EulerDiscreteScheduler"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    _write_json(
        base / "model_index.json",
        {"_class_name": "StableDiffusionXLInpaintPipeline", "_diffusers_version": "0.21.0.dev0", "force_zeros_for_empty_prompt": True,
         "requires_aesthetics_score": False, **index},
    )  # fmt: skip
    return networks


def _with_prefix(key: str, network: str) -> str:
    """transformers 4 kept CLIP's text half below ``text_model.``; its successor saves it without."""
    bare = network.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection."))
    return f"text_model.{key}" if bare else key


def _write_tokenizers(base: Path) -> int:
    from backend.demo.vocabulary import END, write_tokenizer
    from backend.training.data_processing.prompts import all_prompt_words

    size = 0
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        size = write_tokenizer(base / name, all_prompt_words(), pad=pad)
        settings = tokenizer_config(pad)
        _write_json(base / name / "tokenizer_config.json", settings)
        plain = {key: {k: v for k, v in settings[key].items() if k != "__type"} for key in ("bos_token", "eos_token", "unk_token")}
        _write_json(base / name / "special_tokens_map.json", {**plain, "pad_token": pad})
    return size


def write_parser(folder: Path, *, seed: int = 0) -> None:
    """``face-parsing``, four stages as MiT's."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    settings = {
        "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.1, "decoder_hidden_size": 32, "depths": [1, 2, 1, 1],
        "drop_path_rate": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_sizes": [8, 16, 40, 64],
        "id2label": {str(number): name for number, name in enumerate(FACE_PARTS)}, "initializer_range": 0.02,
        "label2id": {name: number for number, name in enumerate(FACE_PARTS)}, "layer_norm_eps": 1e-06, "mlp_ratios": [4, 4, 4, 4],
        "num_attention_heads": [1, 2, 5, 8], "num_channels": 3, "num_encoder_blocks": 4, "patch_sizes": [7, 3, 3, 3],
        "semantic_loss_ignore_index": 255, "sr_ratios": [8, 4, 2, 1], "strides": [4, 2, 2, 2],
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SegformerForSemanticSegmentation(SegformerConfig(**settings)).eval()
    target = weights.folder(folder, "face_parser")
    network.save_pretrained(target)  # tests hold its names against the published ones
    extra = {"_name_or_path": "jonathandinu/face-parsing", "architectures": ["SegformerForSemanticSegmentation"], "downsampling_rates": [1, 4, 8, 16],
             "image_size": 224, "model_type": "segformer", "reshape_last_stage": True, "torch_dtype": "float32", "transformers_version": "4.37.0.dev0"}  # fmt: skip
    _write_json(target / "config.json", {**extra, **settings})
    _write_json(target / "preprocessor_config.json", PARSER_PREPROCESSING)


def write_clip(folder: Path, *, seed: int = 0) -> Any:
    """``clip``: both halves in one file, with the position ids that old versions stored; returns the whole network."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    text, vision = (
        {**small, "vocab_size": 60, "model_type": "clip_text_model"},
        {**small, "patch_size": 32, "model_type": "clip_vision_model"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    target = weights.folder(folder, "clip_image")
    network.save_pretrained(target)  # tests hold its names against the published ones
    stored = load_file(target / "model.safetensors")
    stored["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    stored["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    _write(target / "model.safetensors", stored)
    _write_json(
        target / "config.json",
        {"_name_or_path": "openai/clip-vit-base-patch32", "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
         "model_type": "clip", "projection_dim": 16, "text_config": text, "vision_config": vision, "transformers_version": None},
    )  # fmt: skip
    _write_json(target / "preprocessor_config.json", CLIP_PREPROCESSING)
    return network


def write_dino(folder: Path, *, seed: int = 0) -> Any:
    """``dinov2``; returns the network."""
    from transformers import Dinov2Config, Dinov2Model

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14, "mlp_ratio": 4,
                "layerscale_value": 1.0, "qkv_bias": True, "use_swiglu_ffn": False}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Dinov2Model(Dinov2Config(**settings)).eval()
    target = weights.folder(folder, "dino")
    network.save_pretrained(target)  # tests hold its names against the published ones
    _write_json(
        target / "config.json",
        {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "torch_dtype": "float32",
            "transformers_version": "4.32.0.dev0",
            **settings,
        },
    )
    _write_json(target / "preprocessor_config.json", DINO_PREPROCESSING)
    return network


def write_resnet(folder: Path, *, seed: int = 0) -> Any:
    """``resnet50``: torchvision's whole network, its classifier too, in full size; returns it."""
    from torchvision.models import resnet50

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = resnet50().eval()
    _write(weights.folder(folder, "resnet") / "model.safetensors", network.state_dict())
    return network


def write_vgg(folder: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """``vgg16`` as timm has it: torchvision's ``features``, the classifier as convolutions (thin here); returns its tensors."""
    from torchvision.models import vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            features = vgg16().features
        features = features.to_empty(device="cpu")
        for layer in features:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                torch.nn.init.zeros_(layer.bias)
        tensors = {f"features.{name}": value for name, value in features.state_dict().items()}
        for name, shape in (("pre_logits.fc1", (8, 512, 7, 7)), ("pre_logits.fc2", (8, 8, 1, 1)), ("head.fc", (1000, 8))):
            tensors |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.zeros(shape[0])}
    _write(weights.folder(folder, "perceptual") / "model.safetensors", tensors)
    return tensors


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
