"""Optimizers besides AdamW: which settings fit them, what they keep of a tensor, and which tensors are whose."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.trainer.config.loading import build_config, changes, dump, without_later_fields
from controlbooth.trainer.config.run import OptimizerConfig
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.engine.deepspeed import check_fits
from controlbooth.trainer.engine.optimizers import make_optimizers, matrix_shape, moved_by_muon, state_bytes
from controlbooth.trainer.planning.rank_memory import _cut_elements, _states

TREE = dict(
    name="t", max_steps=10, global_batch_size=8, micro_batch_size=2,
    model=dict(base="b"), data=dict(shards="s", condition="edges"),
)  # fmt: skip
NAMES = ("adamw8bit", "adafactor", "prodigy", "muon")
SHAPES = {
    "conv_in.weight": (8, 3, 3, 3),
    "middle.weight": (64, 8, 3, 3),
    "wide.weight": (160, 64),
    "wide.bias": (160,),
    "odd.weight": (77, 61),
    "norm.weight": (4100,),
}


def config(name, rate=1e-3, **sections):
    rate = 1.0 if name == "prodigy" and rate == 1e-3 else rate
    return build_config(TREE | {"optimizer": dict(name=name, learning_rate=rate)} | sections)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (dict(engine=dict(zero_stage=0)), "set engine.zero_stage=2, which is the same on one rank"),
        (dict(engine=dict(zero_stage=3)), "set engine.zero_stage=2"),
        (dict(engine=dict(offload_optimizer=True)), "is not offloaded: set engine.offload_optimizer=false"),
        (dict(model=dict(base="b", unlock_decoder_at=1)), "leave one of them out"),
    ],
)
def test_settings_that_only_adamw_has_are_refused_with_a_remedy(name, sections, said):
    with pytest.raises(ValueError, match=said):
        config(name, **sections)
    assert config(name, engine=dict(zero_stage=1)).optimizer.name == name


def test_fields_without_a_meaning_and_rates_that_make_none_are_refused():
    for field in (dict(betas=[0.5, 0.9]), dict(epsilon=1e-6)):
        with pytest.raises(ValueError, match="which optimizer.name=adafactor has not: leave it out"):
            OptimizerConfig(name="adafactor", **field)
        assert OptimizerConfig(name="muon", **field) and OptimizerConfig(name="adamw8bit", **field)
    for rate in (1e-5, 0.09, 11.0):
        with pytest.raises(ValueError, match="set learning_rate=1, or another number from 0.1 to 10"):
            config("prodigy", rate)
    assert OptimizerConfig(name="prodigy", learning_rate=0.5)


def test_ranks_and_gradients_that_an_optimizer_cannot_take_are_refused_at_the_start():
    with pytest.raises(ValueError, match="there are 2: start one, or take another"):
        check_fits(OptimizerConfig(name="prodigy", learning_rate=1.0), 2, flat=True)
    with pytest.raises(ValueError, match=r"set engine.zero_stage=1"):
        check_fits(OptimizerConfig(name="muon"), 8, flat=False)
    check_fits(OptimizerConfig(), 8, flat=False)
    check_fits(OptimizerConfig(name="muon"), 8, flat=True)


def test_subjects_take_them_with_all_layers_and_not_with_adapters():
    tree = dict(name="t", model=dict(base="b"), optimizer="muon")
    with pytest.raises(ValueError, match="optimizer=muon is for method=full"):
        SubjectRunConfig.model_validate(tree)
    assert SubjectRunConfig.model_validate(tree | {"method": "full"}).optimizer == "muon"
    with pytest.raises(ValueError, match="set learning_rate=1"):
        SubjectRunConfig.model_validate(tree | {"method": "full", "optimizer": "prodigy"})
    with pytest.raises(ValueError, match="set engine.zero_stage=2"):
        SubjectRunConfig.model_validate(tree | {"method": "full", "engine": dict(zero_stage=3)})


def test_a_run_with_adamw_has_the_digest_that_it_had_before_there_were_others():
    tree = without_later_fields(build_config(TREE).model_dump(mode="json"))
    assert "name" not in tree["optimizer"] and "activations" not in tree["engine"]
    other = without_later_fields(config("muon").model_dump(mode="json"))
    assert other["optimizer"]["name"] == "muon"
    assert "optimizer.name: adamw -> muon" in changes(dump(build_config(TREE)), dump(config("muon")))


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'controlbooth\[optimizers\]'"):
        make_optimizers(config(name).optimizer, {"w": nn.Parameter(torch.ones(2, 2))})


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_state_of_a_tensor_is_what_the_library_keeps(name):
    weights = {key: nn.Parameter(torch.ones(matrix_shape(shape))) for key, shape in SHAPES.items()}
    optimizers = make_optimizers(config(name).optimizer, weights)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    shared = ("qmap1", "qmap2")  # bitsandbytes' tables, one pair for all tensors
    for key, shape in SHAPES.items():
        (state,) = (one.state[weights[key]] for one in optimizers if weights[key] in one.state)
        kept = sum(v.numel() * v.element_size() for k, v in state.items() if torch.is_tensor(v) and k not in shared)
        assert kept == state_bytes(name, key, shape), key


def test_muon_moves_matrices_between_a_networks_ends(load_tiny):
    controlnet = build_controlnet(load_tiny("sd15").denoiser)
    moved = {name for name, weight in controlnet.named_parameters() if moved_by_muon(name, weight.shape)}
    assert "down_blocks.0.resnets.0.conv1.weight" in moved and "time_embedding.linear_1.weight" in moved
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight" in moved
    ends = ("conv_in.", "controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
    assert not [name for name in moved if name.startswith(ends) or name.endswith(".bias") or "norm" in name]
    assert moved_by_muon("controlnet.down_blocks.0.resnets.0.conv1.weight", (4, 4, 3, 3))
    assert not moved_by_muon("text_encoders.0.embeddings.token_embedding.weight", (9, 4))


def test_the_fullest_share_and_the_tensors_that_shares_cut_are_counted():
    one: Any = SimpleNamespace(states=((10, 100), (30, 7), (2, 50), (6, 1)))  # 48 elements in four tensors
    assert _states(one, 48) == 158 and _cut_elements(one, 48) == 0
    assert _states(one, 24) == 107 and _cut_elements(one, 24) == 30  # the second lies in both
    assert _states(one, 12) == 107 and _cut_elements(one, 12) == 30
    assert _states(one, 8) == 107 and _cut_elements(one, 8) == 40
