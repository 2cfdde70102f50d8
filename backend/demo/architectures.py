"""The library models of the miniature world: SDXL's, SegFormer's and ControlNet's real classes at a hundredth of their size.

Every width that SDXL fixes by itself is scaled down together: two text encoders of 64 + 64 channels give a context of 128, and the
added condition is the pooled text (64) beside six sizes of 32 channels (DESIGN 4.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, SegformerForSemanticSegmentation

IMAGE_SIDE = 128
LATENT_SIDE = IMAGE_SIDE // 8
PARSER_SIDE = 192
TEXT_WIDTH = 64
CONTEXT_WIDTH = 2 * TEXT_WIDTH
TIME_IDS_WIDTH = 32
MAX_TOKENS = 77
STYLE_TOKENS = 16
UNET_WIDTHS = (64, 64, 96)
VAE_WIDTHS = (16, 32, 64, 96)
VAE_WIDTHS_LONG = (32, 64, 96, 128)  # for a training on a card
_GROUPS = 16
FACE_PARTS = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip", "hair",
    "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
"""CelebAMask-HQ's classes in the order of jonathandinu/face-parsing."""


def unet() -> UNet2DConditionModel:
    """A 9-channel UNet of SDXL's type: noisy latents 4, mask 1, masked-image latents 4, each (B, c, 16, 16)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=9,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=tuple(width // 32 for width in UNET_WIDTHS),  # read by SDXL's UNets as the number of heads
        norm_num_groups=_GROUPS,
        cross_attention_dim=CONTEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_IDS_WIDTH + TEXT_WIDTH,
    )


def controlnet(base: UNet2DConditionModel | None = None) -> ControlNetModel:
    """A ControlNet (arXiv 2302.05543) for ``unet()``: 4 latent channels and an RGB map of the image's size.

    It has no attention, as the small ControlNets of SDXL: the map speaks of places only. What it shares with ``base`` starts from it.
    """
    from diffusers import ControlNetModel

    model = ControlNetModel(
        in_channels=4,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        cross_attention_dim=CONTEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_IDS_WIDTH + TEXT_WIDTH,
        conditioning_embedding_out_channels=(8, 16, 32, 64),
    )
    if base is not None:
        weights = {name: tensor for name, tensor in base.state_dict().items() if name in model.state_dict()}
        weights["conv_in.weight"] = weights["conv_in.weight"][:, :4]  # the noisy latents' share of the nine channels
        model.load_state_dict(weights, strict=False)
    return model


def vae(widths: tuple[int, ...] = VAE_WIDTHS) -> AutoencoderKL:
    """An AutoencoderKL with 4 latent channels and factor 8; ``scaling_factor`` 1 until training has measured the latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIDE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def text_encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders. The last two ids of ``vocabulary`` are start and end of text, as in CLIP's own.

    CLIP's initial embeddings have a standard deviation of 0.02, which training raises; without training a prompt would be a
    context of nearly nothing beside style tokens of unit size, so they start at 0.7 and positions at 0.2.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            hidden_act=activation,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )

    first, second = CLIPTextModel(config("quick_gelu")), CLIPTextModelWithProjection(config("gelu"))
    for model in (first, second):
        for name, parameter in model.named_parameters():
            if name.endswith("token_embedding.weight"):
                nn.init.normal_(parameter, std=0.7)
            elif name.endswith("position_embedding.weight"):
                nn.init.normal_(parameter, std=0.2)
    return first, second


def parser() -> SegformerForSemanticSegmentation:
    """A SegFormer (arXiv 2105.15203) over CelebAMask-HQ's 19 classes: (B, 3, 192, 192) to logits (B, 19, 48, 48)."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            hidden_sizes=[16, 32, 64, 96],
            num_attention_heads=[1, 2, 4, 6],
            decoder_hidden_size=64,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
            id2label=dict(enumerate(FACE_PARTS)),
            label2id={name: index for index, name in enumerate(FACE_PARTS)},
        )
    )


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's betas rescaled to zero terminal SNR, velocity prediction, trailing steps (arXiv 2305.08891).

    With SDXL's own schedule the noisiest latents still carry the picture's mean colour, the more so the smaller they are: at 16 x 16 the
    network learns to read the hair's colour there, where it stands in training and does not in sampling, instead of in its tokens.
    """
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
