"""Subjects on transformers of flow matching: what they learn by, in a stack as each does alone, and what is refused."""

import bases
import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from controlbooth.data.order import draws
from controlbooth.models.families import FAMILIES
from controlbooth.models.lora import StackedAdamW, layers_of, reset_subject, subject_weights
from controlbooth.models.noise.process import FlowSettings, level_thresholds
from controlbooth.models.sampling import sample
from controlbooth.models.text import encode_prompts
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.adapted import attach, drawn_subjects, trained_encoders
from controlbooth.trainer.dreambooth.batches import Pictures, Training, make_batch, subject_seed
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.step import dreambooth_step, predict
from controlbooth.trainer.run.base import open_base, with_usual_guidance

FAMILIES_HERE = tuple(bases.TRANSFORMERS)
SIDE = 64
NAMES = ("rex", "mug", "cap")


def config_of(folder, **changes):
    tokens = {} if folder.name == "miniature-dit" else dict(text_tokens=bases.T5_TOKENS)
    tree = dict(name="pets", model=dict(base=str(folder), **tokens), resolution=SIDE, precision="fp32")
    return SubjectRunConfig.model_validate(tree | changes)


def in_double(base):
    """Adam makes much of the rounding of gradients that are nearly zero."""
    for module in (base.denoiser, *base.text_encoders):
        module.double()
    return base


def training_of(base, name, number):
    task = Task(name, (), "d", "abc"[number], f"a {'abc'[number]} d", "a d", 100, 1e-2, 4)
    draw = torch.Generator().manual_seed(number)
    shape = (2, base.latent_channels, SIDE // 8, SIDE // 8)
    kinds = []
    for prompt in (task.instance_prompt, task.class_prompt):
        latents, text = torch.randn(shape, generator=draw), encode_prompts(base, [prompt], picture_size=(SIDE, SIDE))
        kinds.append(Pictures(latents, torch.zeros(shape), text, prompt))
    return Training(task, *kinds)


def trained(config, base, numbers, steps=3):
    """Trains these subjects together, and returns the weights of each and all losses."""
    trainings = [training_of(base, NAMES[number], number) for number in numbers]
    _, adapters = attach(config, base, len(numbers), 4)
    for slot, training in enumerate(trainings):
        reset_subject(adapters, slot, 4, subject_seed(config, training.task))
    optimizer, losses = StackedAdamW(adapters), []
    for _ in range(steps):
        for parameter in optimizer.parameters:
            parameter.grad = None
        found = dreambooth_step(
            base,
            lambda *inputs: predict(base, SIDE, *inputs),
            torch.Tensor.backward,
            make_batch(config, base, trainings),
            len(trainings),
            config.prior.weight,
            None,
        )
        rates, clips = (torch.full((len(trainings),), value) for value in (1e-2, 1.0))
        optimizer.step(rates, [training.step for training in trainings], clips)
        losses.append(torch.stack(found))
        for training in trainings:
            training.step += 1
    return [subject_weights(adapters, slot, 4) for slot in range(len(numbers))], torch.stack(losses)


@pytest.mark.parametrize("layers", ["attention", "attention+mlp"])
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_subjects_in_one_batch_learn_as_each_does_alone(family, layers, base_folder):
    config = config_of(base_folder(family), adapter=dict(layers=layers))
    weights, losses = trained(config, in_double(open_base(config, torch.float32, "cpu")), range(3))
    for number in range(3):
        base = in_double(open_base(config, torch.float32, "cpu"))
        (own,), own_losses = trained(config, base, [number])
        torch.testing.assert_close(losses[:, :, number], own_losses[:, :, 0], rtol=1e-5, atol=1e-7)
        assert own.keys() == weights[number].keys()
        assert max((weights[number][name] - own[name]).abs().max() for name in own) < 1e-5
        assert max(tensor.abs().max() for name, tensor in own.items() if "lora_B" in name) > 1e-2


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_adapters_in_text_encoders_are_each_subjects_own_too(family, base_folder):
    config = config_of(base_folder(family), train_text_encoder=True)
    weights, _ = trained(config, in_double(open_base(config, torch.float32, "cpu")), range(3))
    (own,), _ = trained(config, in_double(open_base(config, torch.float32, "cpu")), [1])
    assert max((weights[1][name] - own[name]).abs().max() for name in own) < 1e-5
    folders = {name.partition(".")[0] for name, tensor in own.items() if "lora_B" in name and tensor.abs().max() > 1e-3}
    assert folders == {"transformer", "text_encoder"} | ({"text_encoder_2"} if family == "sd3" else set())


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_a_stack_in_half_precision_learns_what_each_does_alone_within_its_rounding(family, base_folder):
    config = config_of(base_folder(family))
    weights, losses = trained(config, open_base(config, torch.bfloat16, "cpu"), range(3), steps=1)
    (own,), own_losses = trained(config, open_base(config, torch.bfloat16, "cpu"), [2], steps=1)
    assert all(tensor.dtype == torch.float32 for tensor in weights[2].values())
    torch.testing.assert_close(losses[:, :, 2], own_losses[:, :, 0], rtol=1e-2, atol=1e-3)
    assert max((weights[2][name] - own[name]).abs().max() for name in own) < 2.1e-2  # one step of Adam, of 1e-2, turned


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_loss_is_that_of_flow_matching_with_the_runs_density_weighting_and_guidance(family, base_folder):
    flow = dict(density="mode", weighting="cosmap", shift=2.0, embedded_guidance=1.5)
    config = config_of(base_folder(family), flow=flow, instance_batch_size=3)
    base = open_base(config, torch.float32, "cpu")
    training = training_of(base, "rex", 0)
    batch = make_batch(config, base, [training])
    seed = subject_seed(config, training.task)
    thresholds = level_thresholds(FlowSettings(**flow))
    drawn = [
        draws.levels_by_density(draws.hash64(seed, one), np.arange(3), thresholds) for one in ("instance", "prior")
    ]
    assert batch.levels.tolist() == np.concatenate(drawn).tolist()
    if family == "flux":
        assert batch.text.added_cond_kwargs["guidance"].tolist() == [1.5] * 6
    sigma = (batch.levels.double() + 1) / 1000
    sigma = 2 * sigma / (1 + sigma)
    share, weight = sigma[:, None, None, None], 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
    noisy = ((1 - share) * batch.latents + share * batch.noise).float()
    with torch.no_grad():
        velocity = predict(base, SIDE, noisy, (1000 * sigma).float(), batch.text)
        errors = mse_loss(velocity, batch.noise - batch.latents, reduction="none").flatten(1).mean(1) * weight
        found = dreambooth_step(
            base, lambda *inputs: predict(base, SIDE, *inputs), lambda loss: None, batch, 1, 1.0, None
        )
    torch.testing.assert_close(torch.cat(found).double(), errors.view(2, 3).mean(1), rtol=1e-5, atol=0)


def test_adapted_layers_are_those_of_blocks_alone(base_folder):
    found = {}
    for family in ("sd3", "flux"):
        config = config_of(base_folder(family), adapter=dict(layers="attention+mlp"))
        _, adapters = attach(config, open_base(config, torch.float32, "cpu"), 1, 2)
        found[family] = {name.removeprefix("transformer.") for name in adapters}
        assert all("blocks." in name for name in found[family])  # the network's own proj_out is none
    own = {"to_q", "to_k", "to_v", "to_out.0"}
    text = {"add_q_proj", "add_k_proj", "add_v_proj"}
    both = {f"ff{which}.net.{layer}" for which in ("", "_context") for layer in ("0.proj", "2")}
    first = {name.removeprefix("transformer_blocks.0.") for name in found["sd3"] if ".blocks.0." in f".{name[12:]}"}
    assert first == {f"attn.{name}" for name in own | text | {"to_add_out"}} | {f"attn2.{name}" for name in own} | both
    single = {name.split(".", 2)[2] for name in found["flux"] if name.startswith("single_transformer_blocks.0.")}
    assert single == {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    double = {name.split(".", 2)[2] for name in found["flux"] if name.startswith("transformer_blocks.0.")}
    assert double == {f"attn.{name}" for name in own | text | {"to_add_out"}} | both
    assert "add_q_proj" not in layers_of("attention", is_transformer=False)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_subjects_are_drawn_together_as_each_is_alone(family, base_folder):
    """With guidance, and with text encoders of their own, whose empty prompt is no common one."""
    config = config_of(base_folder(family), train_text_encoder=True)
    pictures = []
    for numbers in ((0, 1), (1,)):
        base = open_base(config, torch.float32, "cpu")
        _, adapters = attach(config, base, len(numbers), 4)
        for slot, number in enumerate(numbers):
            reset_subject(adapters, slot, 4, seed=number)
            for name in sorted(adapters):
                draw = torch.Generator().manual_seed(number)
                adapters[name].up.data[slot] = torch.randn(adapters[name].up.shape[1:], generator=draw) / 2
        branches = 1 if family == "flux" else 2
        with drawn_subjects(adapters, range(len(numbers)), branches):
            seeds = [number + 7 for number in numbers]
            drawn = sample(
                base, ["a d"] * len(numbers), seeds=seeds, steps=2, guidance_scale=3.0, picture_size=(64, 64)
            )
        pictures.append(drawn[-1].int())
        plain = sample(open_base(config, torch.float32, "cpu"), ["a d"], seeds=[8], steps=2, guidance_scale=3.0,
                       picture_size=(64, 64))[0].int()  # fmt: skip
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    assert (pictures[0] - plain).abs().max() > 20


def test_t5_is_no_text_encoder_that_learns(load_tiny):
    assert list(trained_encoders(load_tiny("sd3"))) == ["text_encoder", "text_encoder_2"]
    assert list(trained_encoders(load_tiny("flux"))) == ["text_encoder"]
    assert list(trained_encoders(load_tiny("sdxl"))) == ["text_encoder", "text_encoder_2"]


def test_guidance_that_a_run_leaves_out_is_its_familys(base_folder):
    for family, guidance in (("sd15", 7.5), ("sd3", 4.5), ("flux", 3.5)):
        config = SubjectRunConfig.model_validate(dict(name="x", model=dict(base=str(base_folder(family)))))
        base = open_base(config.model_copy(update=dict(resolution=64)), torch.float32, "meta")
        told = with_usual_guidance(config, base)
        assert (told.prior.guidance_scale, told.validation.guidance_scale) == (guidance, guidance)
    asked = config_of(base_folder("flux"), prior=dict(guidance_scale=2.0))
    assert with_usual_guidance(asked, base).prior.guidance_scale == 2.0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sd3", dict(min_snr_gamma=5.0), "min_snr_gamma=5.0 is for a U-Net, and the base is Stable Diffusion 3"),
        ("flux", dict(adapter=dict(layers="attention+convolutions")), "adapter.layers=attention+convolutions is for a"),
        ("flux", dict(model=dict(base="x", t5=False)), "model.t5=False is for a base with T5 as its third"),
        ("miniature-dit", dict(model=dict(base="x", text_tokens=9)), "model.text_tokens=9 is for a base with T5"),
        ("sd15", dict(flow=dict(density="mode")), "flow.density=mode is for a base of flow matching"),
        ("sdxl", dict(adapter=dict(layers="attention+mlp")), "adapter.layers=attention+mlp is for a transformer"),
    ],
)
def test_settings_of_the_other_world_are_refused_by_their_name(family, changes, message):
    config = SubjectRunConfig.model_validate(dict(name="x", model=dict(base="x")) | changes)
    (told,) = misplaced(config, FAMILIES[family])
    assert told.startswith(message) and told.endswith("leave it out")
    assert misplaced(SubjectRunConfig.model_validate(dict(name="x", model=dict(base="x"))), FAMILIES[family]) == []


def test_a_side_that_a_transformer_cannot_take_is_refused(base_folder):
    for side, message in ((72, "resolution=72 is not a multiple of 16"), (512, "resolution=512 is more than 128")):
        with pytest.raises(ValueError, match=message):
            open_base(config_of(base_folder("sd3"), resolution=side), torch.float32, "meta")
