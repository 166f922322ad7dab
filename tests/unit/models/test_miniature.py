"""The weights that are shipped, as they are in the repository."""

import json

import numpy as np
import pytest
import torch

from controlbooth.data.scenes.render import CLASSES, COLOURS, HELD_OUT_SEED, SIZES, render, scene
from controlbooth.models.pretrained import MINIATURE, load_base
from controlbooth.models.sampling import sample
from controlbooth.trainer.evaluation.scenes.judge import (
    ATTRIBUTES,
    facts,
    load_judge,
    prompt_accuracy,
    prompt_accuracy_by_picture,
    read,
)


@pytest.fixture(scope="module")
def base():
    return load_base("miniature")


def test_the_shipped_base_is_at_most_30_megabytes_of_fp16_safetensors():
    files = [path for path in MINIATURE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}


def test_diffusers_own_pipeline_reads_the_shipped_folder():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red ball on a white background", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)


def test_every_word_of_the_captions_is_one_token(base):
    (tokenizer,) = base.tokenizers
    for word in ("a", "and", "on", "background", *SIZES, *COLOURS, *CLASSES, "sks"):
        assert len(tokenizer.tokenize(word)) == 1, word
    longest = "a large orange house and a large purple heart on a yellow and orange background"
    assert len(tokenizer(longest).input_ids) <= tokenizer.model_max_length


def test_the_judge_reads_real_held_out_scenes_at_97_percent():
    scenes = [scene(HELD_OUT_SEED, 5000 + i) for i in range(256)]
    seen = read(load_judge(), np.stack([render(what).image for what in scenes]))
    figures = prompt_accuracy(seen, scenes)
    assert min(figures[name] for name in ("object_class", "object_colour", "background", "count")) >= 0.97, figures


def test_prompt_accuracy_counts_what_is_there_by_hand():
    scenes = [scene(0, 0), scene(0, 1)]  # two objects on two tones; one object on one
    truth = np.array([facts(what) for what in scenes])
    assert prompt_accuracy(truth, scenes) == dict.fromkeys(
        ("object_class", "object_colour", "object_size", "background", "count"), 1.0
    )
    wrong = truth.copy()
    wrong[0, list(ATTRIBUTES).index("right_class")] += 1
    assert prompt_accuracy(wrong, scenes)["object_class"] == pytest.approx(2 / 3)
    assert prompt_accuracy_by_picture(wrong, scenes)["object_class"].tolist() == [0.5, 1.0]
    assert prompt_accuracy_by_picture(wrong, scenes)["background"].tolist() == [1.0, 1.0]


def test_latents_have_unit_variance_so_that_noise_levels_mean_what_the_schedule_says(base):
    pictures = np.stack([render(scene(HELD_OUT_SEED, i)).image for i in range(32)])
    pixel_values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    latents = base.encode_latents(pixel_values)
    assert latents.shape == (32, 12, 8, 8)
    assert latents.std().item() == pytest.approx(1.0, abs=0.15)


def test_prompts_change_the_picture_as_they_ask(base):
    prompts = ["a large red ball on a white background", "a large red ball on a blue background"]
    white, blue = sample(base, prompts, seeds=[3, 3], steps=10, guidance_scale=3.0).numpy().astype(int)
    border = np.r_[0:4, 60:64]
    assert white[border].mean() > 190
    assert blue[border][..., 2].mean() - blue[border][..., 0].mean() > 60


def test_the_model_card_tells_the_recipe_and_the_figures():
    card = (MINIATURE / "README.md").read_text()
    for needed in ("controlbooth.trainer.miniature.recipe", "object class", "object colour", "background"):
        assert needed in card
    assert json.loads((MINIATURE / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
