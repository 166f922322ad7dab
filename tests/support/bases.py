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


def write_base(folder: Path, family: str) -> Path:
    """A diffusers folder of about 100,000 parameters. Equal weights at every call."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[family])
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
