"""Tiny, randomly initialised base models of every family, written as real diffusers folders.

torch and what builds on it are imported inside the functions: most unit tests do without, and start in no time.
"""

import json
from pathlib import Path

TOKENS = 12
CHARACTERS = "abcdefghijklmnopqrstuvwxyz,"
VAE = dict(
    block_out_channels=(4, 4, 8, 8),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=2,
)
UNET = dict(
    sample_size=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
BLOCKS_BELOW = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
)
UNETS = {
    "sd15": UNET,
    "sd21": UNET | dict(use_linear_projection=True, attention_head_dim=(2, 4)),
    "sdxl": UNET
    | BLOCKS_BELOW
    | dict(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 24,
    ),
    "miniature": UNET
    | BLOCKS_BELOW
    | dict(
        in_channels=12,
        out_channels=12,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    ),
}
T5_LETTERS = "abcdefghijklmnopqrstuvwxyz,"
SD3 = dict(
    sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=40,
    pos_embed_max_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm",
)  # fmt: skip
FLUX = dict(
    in_channels=16, num_layers=4, num_single_layers=4, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
T5_TOKENS = 20
UNET_FAMILIES = tuple(UNETS)
TRANSFORMER_FAMILIES = ("sd3", "flux")
"""Those that pipelines of diffusers are for."""
MINIATURE_DIT = SD3 | dict(
    patch_size=1, in_channels=12, out_channels=12, joint_attention_dim=16, pooled_projection_dim=16,
    dual_attention_layers=(),
)  # fmt: skip
TRANSFORMERS = {"sd3": SD3, "flux": FLUX, "miniature-dit": MINIATURE_DIT}
PREDICTION = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon", "miniature": "v_prediction"}


def text_config(width: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=2 * len(CHARACTERS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tokenizer():
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((one, -3.0) for one in T5_LETTERS)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = 512
    return tokenizer


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    sizes = dict(vocab_size=len(T5_LETTERS) + 4, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def write_transformer_base(folder: Path, family: str, **changes) -> Path:
    """A diffusers folder of SD3's or FLUX.1's classes with some 50,000 parameters. Equal weights at every call.

    Modulations and the last layer are drawn anew, since diffusers starts some of them at zero, and a picture would
    depend on nothing.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    settings = TRANSFORMERS[family] | changes
    transformer = FluxTransformer2DModel(**settings) if family == "flux" else SD3Transformer2DModel(**settings)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    transformer.save_pretrained(folder / "transformer")
    channels = 12 if family == "miniature-dit" else 4
    vae = AutoencoderKL(
        **VAE,
        latent_channels=channels,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder / "vae")
    if family == "sd3":
        clips = [CLIPTextModelWithProjection(text_config(width)) for width in (16, 24)]
    else:
        clips = [CLIPTextModel(text_config(16))]
    encoders = clips if family == "miniature-dit" else [*clips, t5(settings["joint_attention_dim"])]
    parts = {
        "transformer": ["diffusers", type(transformer).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    for number, encoder in enumerate(encoders, 1):
        name = "text_encoder" if number == 1 else f"text_encoder_{number}"
        beside = name.replace("text_encoder", "tokenizer")
        encoder.save_pretrained(folder / name)
        is_t5 = type(encoder).__name__ == "T5EncoderModel"
        (t5_tokenizer() if is_t5 else tokenizer()).save_pretrained(folder / beside)
        parts[name] = ["transformers", type(encoder).__name__]
        parts[beside] = ["transformers", "T5TokenizerFast" if is_t5 else "CLIPTokenizer"]
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if family == "miniature-dit" else 3.0, use_dynamic_shifting=family == "flux"
    )
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = "FluxPipeline" if family == "flux" else "StableDiffusion3Pipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | parts))
    return folder


def write_base(folder: Path, family: str, **changes) -> Path:
    """A diffusers folder of about 100,000 parameters. Equal weights at every call. changes: of the denoiser's shape."""
    if family in TRANSFORMERS:
        return write_transformer_base(folder, family, **changes)
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[family] | changes)
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(**VAE, latent_channels=unet.config["in_channels"], scaling_factor=0.4).save_pretrained(folder / "vae")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    encoders: dict = {"text_encoder": CLIPTextModel(text_config(16))}
    if family == "sdxl":
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(text_config(24))
    for name, encoder in encoders.items():
        encoder.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        parts[name] = ["transformers", type(encoder).__name__]
        parts[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    options = dict(prediction_type=PREDICTION[family], clip_sample=False, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = DDPMScheduler if family == "miniature" else DDIMScheduler
    scheduler(beta_start=0.00085, beta_end=0.012, **options).save_pretrained(folder / "scheduler")
    parts["scheduler"] = ["diffusers", scheduler.__name__]
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    index = {"_class_name": pipeline, "force_zeros_for_empty_prompt": family == "sdxl"}
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    return folder


def sharp(vae) -> None:
    """Makes the posterior so narrow that a draw from it is its mode, which is what we take of a condition."""
    channels, last = vae.config["latent_channels"], vae.encoder.conv_out
    last.weight.data[channels:] = 0.0
    last.bias.data[channels:] = -60.0
