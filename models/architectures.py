"""The module configurations of Stable Diffusion 1.5, 2.1 and XL, and what files of SD3 and FLUX.1 do not tell.

A single .safetensors file holds weights without configurations, and fetching them needs a network: so they are here.
The dictionaries are the keyword arguments of diffusers' UNet2DConditionModel, AutoencoderKL and DDPMScheduler and of
transformers' CLIPTextConfig; what is left out equals the class's default.
"""

from collections.abc import Mapping
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


@dataclass(frozen=True)
class TransformerFile:
    """What single files of a transformer's family hold, and what their tensors do not tell of it."""

    denoiser: Config
    """Of diffusers' class, without the sizes that are read off the tensors."""
    scheduler: Config
    """Of FlowMatchEulerDiscreteScheduler, where no file beside says it."""
    inside: Mapping[str, str]
    """Of parts that may be in the file beside the transformer: folder -> the beginning of its tensors' names."""
    vae: Config
    text_encoders: tuple[Config, ...]
    """Those that may be in the file."""


_T5_XXL: Config = dict(  # google/t5-v1_1-xxl
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    tie_word_embeddings=False,
)

SD3_FILE = TransformerFile(
    denoiser=dict(attention_head_dim=64, sample_size=128),
    scheduler=dict(shift=3.0),
    inside={
        "vae": "first_stage_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
    vae=_VAE
    | dict(
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    text_encoders=(_CLIP_L, _OPENCLIP_BIGG, _T5_XXL),
)
"""Of SD3-medium, SD3.5-medium and SD3.5-large; the scheduler is that of all their folders."""

FLUX_FILE = TransformerFile(
    denoiser=dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56)),
    scheduler=dict(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    ),
    inside={},
    vae={},
    text_encoders=(),
)
"""The file of FLUX.1-dev holds its transformer alone."""


VAE_FACTOR = 8
"""Pixels per latent position; the hint network brings a condition picture to the latents' size by as much."""
