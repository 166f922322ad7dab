"""The recipe's stage `dit`, with a small network and a few steps."""

import pytest
import torch

from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import sample
from controlbooth.trainer.miniature import dit
from controlbooth.trainer.miniature.text import draw_captions


@pytest.fixture
def small(monkeypatch):
    sizes = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32)
    monkeypatch.setattr(dit, "DIT", dit.DIT | sizes)


def test_a_new_transformer_predicts_zeros_and_all_of_it_gets_gradients_but_what_the_last_block_leaves_unused(small):
    network = dit.build_dit()
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw) for shape in ((2, 12, 8, 8), (2, 24, 128), (2, 128))]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for step in range(8):
        predicted = network(*inputs, torch.tensor([100.0, 900.0]), return_dict=False)[0]
        assert predicted.any() == (step > 0)
        optimizer.zero_grad()
        (predicted - inputs[0]).square().mean().backward()
        optimizer.step()
    unused = {name for name, one in network.named_parameters() if one.grad is None or not one.grad.any()}
    names = ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")  # of the text's queries, never read
    assert unused == {f"transformer_blocks.1.attn.{name}" for name in names}


def test_levels_are_one_from_each_of_equally_likely_ranges():
    process = dit.flow_matching()
    torch.manual_seed(0)
    levels = dit.stratified_levels(process, 1000)
    assert levels.dtype == torch.int64 and 0 <= levels.min() and levels.max() < process.levels
    assert bool((levels.diff() >= 0).all())
    middle = ((levels >= 269) & (levels < 731)).float().mean()  # one standard deviation of a logit-normal
    assert abs(middle - 0.683) < 0.005


def test_it_trains_goes_on_and_is_exported_as_a_base_that_is_recognised(small, tmp_path):
    raw = torch.randn(300, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(dict(raw=raw), tmp_path / "shipped-latents.pt")
    dit.train_dit(tmp_path, minutes=0.005, final=False)
    first = torch.load(tmp_path / dit.STATE, weights_only=True)
    dit.train_dit(tmp_path, minutes=0.005, final=True)
    second = torch.load(tmp_path / dit.STATE, weights_only=True)
    assert 0 < first["step"] < second["step"]
    assert not torch.equal(first["model"]["proj_out.weight"], second["model"]["proj_out.weight"])
    assert dit.export_dit(tmp_path, tmp_path / "base") == second["step"]
    base = load_base(tmp_path / "base")
    assert base.family.name == "miniature-dit" and base.picture_size == (64, 64)
    weight = base.denoiser.proj_out.weight
    torch.testing.assert_close(weight, second["average"]["proj_out.weight"], atol=1e-4, rtol=1e-3)
    picture = sample(base, ["a red mug on a teal background"], seeds=[0], steps=2, guidance_scale=3.0)
    assert picture.shape == (1, 64, 64, 3)


def test_a_tenth_of_the_captions_are_empty():
    import numpy as np

    captions = draw_captions(np.arange(1000), np.random.default_rng(0))
    assert 70 < captions.count("") < 130 and any("background" in one for one in captions)
