"""The module configurations of Stable Diffusion 1.5, 2.1 and XL, as published beside their weights.

A single .safetensors file holds weights without configurations, and fetching them needs a network: so they are here.
The dictionaries are the keyword arguments of diffusers' UNet2DConditionModel, AutoencoderKL and DDPMScheduler and of
transformers' CLIPTextConfig; what is left out equals the class's default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINIATURE = Path(__file__).parent / "miniature"
"""The base that is shipped with controlbooth, a diffusers folder; `load_base("miniature")` reads it."""

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What is needed to build the empty modules of one base."""

    unet: Config
    vae: Config
    text_encoders: tuple[Config, ...]
    """One for SD1.5 and SD2.1; SDXL adds a second, with the projection that gives its pooled embedding."""
    noise_scheduler: Config


_NOISE_SCHEDULER: Config = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    steps_offset=1,
    timestep_spacing="leading",
)

_VAE: Config = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
    scaling_factor=0.18215,
)

_CLIP_L: Config = dict(  # openai/clip-vit-large-patch14
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    projection_dim=768,
    bos_token_id=0,
    eos_token_id=2,  # the published value: transformers then pools at the largest token id, the real end of text
    pad_token_id=1,
)

_OPENCLIP_H: Config = _CLIP_L | dict(  # of 24 layers the last is not used: Stable Diffusion 2 reads the penultimate
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
)

_OPENCLIP_BIGG: Config = _CLIP_L | dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)

SD15 = Architecture(
    unet=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    vae=_VAE,
    text_encoders=(_CLIP_L,),
    noise_scheduler=_NOISE_SCHEDULER | dict(prediction_type="epsilon"),
)

SD21 = Architecture(
    unet=dict(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    vae=_VAE | dict(sample_size=768),
    text_encoders=(_OPENCLIP_H,),
    noise_scheduler=_NOISE_SCHEDULER | dict(prediction_type="v_prediction"),
)

SDXL = Architecture(
    unet=dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    vae=_VAE | dict(sample_size=1024, scaling_factor=0.13025),
    text_encoders=(_CLIP_L, _OPENCLIP_BIGG),
    noise_scheduler=_NOISE_SCHEDULER | dict(prediction_type="epsilon"),
)
PUBLISHED = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
"""By the families' names; so that a run can be planned without weights, and named before torch is imported."""


VAE_FACTOR = 8
"""Pixels per latent position; the hint network brings a condition picture to the latents' size by as much."""
