"""torch.compile is switched on only where gradients stay what they are. Backends of torch.compile stand for good and
bad compilers: the real one takes minutes, and is in tests/benchmarks/compiled.py."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.trial import compile_where_right, trial_loss
from controlbooth.trainer.engine.compiling import compare, repeated_blocks
from controlbooth.trainer.engine.distributed import World

ONE_RANK = World(0, 1, 0, torch.device("cpu"))


def faulty(graph, inputs):
    """Compiles to what gives one per cent too much."""
    return lambda *values: [one * 1.01 if one.is_floating_point() else one for one in graph(*values)]


def faulty_without_gradients_of_its_own(graph, inputs):
    """Compiles the base's blocks wrongly, whose weights have no gradients, and the ControlNet's rightly."""
    weights = [one for one in inputs if isinstance(one, torch.nn.Parameter)]
    return graph if all(one.requires_grad for one in weights) else faulty(graph, inputs)


def run_of(**changes):
    tree = dict(
        name="t", max_steps=10, global_batch_size=2, micro_batch_size=2,
        model=dict(base="b"), data=dict(shards="s", condition="canny", resolution=64),
    )  # fmt: skip
    return build_config(tree | changes)


@pytest.fixture()
def networks(load_tiny):
    base = load_tiny("miniature")
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser, (4, 8, 8, 16)).float()
    yield run_of(), base, controlnet
    torch.compiler.reset()


def is_compiled(network):
    compiled = [block._compiled_call_impl is not None for block in repeated_blocks(network)]
    assert compiled and len(set(compiled)) == 1
    return compiled[0]


def test_blocks_of_both_networks_are_compiled_where_gradients_are_the_same(networks, capsys):
    config, base, controlnet = networks
    before = trial_loss(config, base, controlnet)
    compile_where_right(config, ONE_RANK, base, controlnet, torch.float32, backend="aot_eager")
    assert is_compiled(base.denoiser) and is_compiled(controlnet)
    assert "blocks of the ControlNet and the base; gradients of" in capsys.readouterr().err
    torch.testing.assert_close(trial_loss(config, base, controlnet), before)


def test_a_compiler_that_computes_other_gradients_is_left_out_aloud(networks, capsys):
    config, base, controlnet = networks
    compile_where_right(config, ONE_RANK, base, controlnet, torch.float32, backend=faulty)
    assert not is_compiled(base.denoiser) and not is_compiled(controlnet)
    said = capsys.readouterr().err
    assert "does not compile the ControlNet and the base" in said and "does not compile the ControlNet alone" in said


def test_the_controlnet_alone_is_compiled_where_the_base_goes_wrong(networks, capsys):
    config, base, controlnet = networks
    backend = faulty_without_gradients_of_its_own
    compile_where_right(config, ONE_RANK, base, controlnet, torch.float32, backend=backend)
    assert not is_compiled(base.denoiser) and is_compiled(controlnet)
    assert "blocks of the ControlNet alone" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_or_missing_its_size_is_wrong():
    plain = {"a": torch.ones(4), "b": torch.full((4,), 1e-9)}
    assert compare(plain, plain, 1e-3).wrong == []
    assert compare(plain, plain | {"a": torch.full((4,), float("nan"))}, 1e-3).wrong == ["a"]
    assert compare(plain, plain | {"a": torch.zeros(4)}, 1e-3).worst == pytest.approx(1.0)
    assert compare(plain, plain | {"b": torch.full((4,), -1e-9)}, 1e-3).wrong == []  # rounding
    assert compare(plain, plain | {"b": torch.ones(4)}, 1e-3).wrong == ["b"]


def test_what_is_compiled_are_the_blocks_that_repeat(networks):
    _, base, _ = networks
    kinds = {type(block) for block in repeated_blocks(base.denoiser)}
    assert BasicTransformerBlock in kinds and len(kinds) == 2


def test_a_run_whose_weights_are_gathered_or_whose_network_changes_is_not_compiled():
    with pytest.raises((ValueError, ConfigError), match="engine.zero_stage=2, or engine.compile=false"):
        run_of(engine=dict(compile=True, zero_stage=3))
    with pytest.raises((ValueError, ConfigError), match="unlock_decoder_at=5 unlocks it: leave one of them out"):
        run_of(engine=dict(compile=True), model=dict(base="b", unlock_decoder_at=5))
