"""Looking at subjects in training on a tiny base: what is drawn, what is kept, and that it changes nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from controlbooth.models.denoisers.registry import denoise
from controlbooth.models.lora import ATTENTION, attach_adapters, chosen_subjects, reset_subject, subject_weights
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run
from controlbooth.trainer.dreambooth.batches import begin_training
from controlbooth.trainer.dreambooth.export import trained_file
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.stack import save_lora
from controlbooth.trainer.dreambooth.tracking import Untracked
from controlbooth.trainer.dreambooth.validation import Studio, draw_samples, is_due, recall, validate_subjects
from controlbooth.trainer.evaluation.encoders import Encoder
from controlbooth.trainer.run.attempt import Attempt

NAMES = ("rex", "mug")
PROMPTS = ["a {identifier} {class_noun} in the snow", "a {class_noun}"]


def config_of(output, **validation):
    settings = dict(prompts=PROMPTS, every_steps=5, sampling_steps=2, guidance_scale=2.0) | validation
    tree = dict(name="pets", output=output, model=dict(base="miniature"), resolution=32, prior=dict(weight=0.0))
    return SubjectRunConfig.model_validate(tree | dict(validation=settings))


@pytest.fixture
def scene(tmp_path, load_tiny):
    """-> base, adapters of two subjects with random weights, their trainings, and what looks at them."""
    config, trainings = config_of(tmp_path, hold_out=1), []
    base, random = load_tiny("sd15"), np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        files = [tmp_path / f"{name}-{shot}.png" for shot in range(3)]
        for file in files:
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        word = ("olis", "kmg")[number]
        task = Task(name, tuple(files[:2]), "dog", word, f"a {word} dog", "a dog", 10, 1e-3, 4, (files[2],))
        trainings.append(begin_training(config, base, task))
    adapters = attach_adapters(base.denoiser, ATTENTION, 2, 4)
    torch.manual_seed(0)
    for slot in range(2):
        reset_subject(adapters, slot, 4, seed=slot)
        for adapter in adapters.values():
            adapter.up.data[slot] = torch.randn_like(adapter.up[slot])
    attempt = Attempt(tmp_path / "pets", 1, "id")
    attempt.folder.mkdir(parents=True)
    return base, adapters, trainings, Studio(config, tmp_path / "pets", attempt, Untracked(), None, None)


def look(scene, slots=(0, 1)):
    base, adapters, trainings, studio = scene

    def keep_best(training, own):
        weights = subject_weights(adapters, trainings.index(training), 4)
        save_lora(studio.attempt, weights, own / "best.safetensors")

    validate_subjects(
        studio,
        base,
        lambda *inputs: denoise(base.denoiser, *inputs),
        [trainings[slot] for slot in slots],
        lambda branches: chosen_subjects(adapters, list(slots) * branches),
        keep_best,
    )


def test_subjects_that_are_drawn_together_are_drawn_as_each_is_alone(scene):
    base, adapters, trainings, studio = scene
    tasks = [training.task for training in trainings]
    with chosen_subjects(adapters, [0, 1] * 2):
        together = draw_samples(studio.config, base, tasks)
    alone = {}
    for slot in range(2):
        with chosen_subjects(adapters, [slot] * 2):
            alone |= draw_samples(studio.config, base, tasks[slot : slot + 1])
    assert together.keys() == set(NAMES) and together["rex"].shape == (4, 32, 32, 3)
    for name in NAMES:
        assert np.abs(together[name].astype(int) - alone[name]).max() <= 1
    assert not np.array_equal(together["rex"][2:], together["mug"][2:])  # their class, by their own weights


def test_looking_leaves_weights_and_random_numbers_as_they_were(scene):
    _, adapters, trainings, studio = scene
    before = {name: (adapter.down, adapter.down.detach().clone()) for name, adapter in adapters.items()}
    state = torch.random.get_rng_state()
    look(scene)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, (parameter, values) in before.items():
        assert adapters[name].down is parameter and torch.equal(parameter, values) and parameter.requires_grad
    first = json.loads((studio.folder / "subjects" / "rex" / "validation.json").read_text())
    assert first == trainings[0].history == [{"step": 0}]
    assert (studio.folder / "subjects" / "mug" / "samples" / "mug-step-00000000.png").is_file()


def test_a_validation_is_due_once_at_its_steps_and_is_recalled_up_to_where_the_subject_goes_on(scene):
    _, _, (training, _), studio = scene
    due = []
    for step in range(11):
        training.step = step
        if is_due(studio.config, training):
            due.append(step)
            look(scene, slots=(0,))
    assert due == [0, 5, 10]
    training.step = 7
    recall(studio, training)
    assert [one["step"] for one in training.history] == [0, 5] and not is_due(studio.config, training)
    training.step = 0
    recall(studio, training)
    assert training.history == [] and is_due(studio.config, training)


def test_the_step_between_learnt_and_copied_is_kept_in_files_of_its_own(scene):
    _, adapters, (training, _), studio = scene
    angle = {"own": 0.0, "drawn": 1.4}

    def embed(pictures):
        """Own pictures lie 0.2 apart, and what is drawn where the test has put it."""
        own = len(pictures) == 2 and not angle.get("seen")
        angle["seen"] = True
        angles = torch.tensor([0.0, 0.2]) if own else torch.full((len(pictures),), angle["drawn"])
        return normalize(torch.stack([angles.cos(), angles.sin()], dim=1), dim=1)

    studio.subject = Encoder("test", "Test", "angles", embed)
    from controlbooth.trainer.dreambooth import validation as subject_validation

    subject_validation.real_rows(studio, training.task)
    own = studio.folder / "subjects" / "rex"
    with pytest.raises(ConfigError, match="rex has no best.safetensors"):
        trained_file(studio.folder, "rex", best=True)
    kept = {}
    for step, drawn in ((0, 1.4), (5, 0.5), (10, 0.1)):  # the last one lies between the two: a copy
        training.step, angle["drawn"] = step, drawn
        for adapter in adapters.values():
            adapter.up.data[0] += 1
        look(scene, slots=(0,))
        kept[step] = subject_weights(adapters, 0, 4)
    told = json.loads((own / "best.json").read_text())
    assert (told["step"], told["learnt"], told["overfits"], told["best"]) == (5, 5, None, 5)
    assert told["prompt"] == "a olis dog" and told["figures"]["test"] == pytest.approx(np.cos([0.5, 0.3]).mean())
    saved = load_file(trained_file(studio.folder, "rex", best=True))
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept[5].items())


def test_fixed_losses_tell_pictures_apart_and_come_again(scene):
    from controlbooth.trainer.dreambooth.validation import fixed_losses

    base, adapters, trainings, studio = scene

    def losses():
        with chosen_subjects(adapters, [0, 1]):
            return fixed_losses(studio.config, base, lambda *inputs: denoise(base.denoiser, *inputs), trainings)

    found = losses()
    assert found == losses() and found["rex"].keys() == {"instance_loss", "held_out_loss"}
    assert found["rex"] != found["mug"] and found["rex"]["instance_loss"] != found["rex"]["held_out_loss"]
    with chosen_subjects(adapters, [1]):
        alone = fixed_losses(studio.config, base, lambda *inputs: denoise(base.denoiser, *inputs), trainings[1:])
    assert alone["mug"] == pytest.approx(found["mug"], rel=1e-4)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (dict(prompts=["a {foo}"]), "prompts.0='a {foo}' is no template"),
        (dict(prompts=[], encoders=dict(efficientnet=True)), "no prompt draws it: give some with {identifier}"),
        (dict(prompts=["a dog"], encoders=dict(efficientnet=True)), "no prompt draws it: give some with {identifier}"),
        (dict(encoders=dict(clip="/clip")), "encoders.clip needs dino or efficientnet beside it"),
        (dict(encoders=dict(dino="/dino", efficientnet=True)), "both given: take one of them"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, validation, message):
    import re

    import yaml

    tree = dict(name="pets", model=dict(base="miniature"), validation=dict(prompts=PROMPTS) | validation)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run(tmp_path / "run.yaml")
