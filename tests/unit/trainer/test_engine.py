import resource

import pytest
import torch

from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import EngineConfig, OptimizerConfig
from controlbooth.trainer.engine.deepspeed import (
    FLAT_ELEMENTS,
    batch_sizes,
    deepspeed_config,
    keeps_gradients_flat,
    learning_rate,
    resolve_precision,
)
from controlbooth.trainer.engine.distributed import allow_open_files


def config(**changes):
    tree = dict(
        name="t", max_steps=10, global_batch_size=8, micro_batch_size=2,
        model=dict(base="b"), data=dict(shards="s", condition="edges"),
    )  # fmt: skip
    return build_config(tree | changes)


def settings(run, world_size):
    sizes = batch_sizes(run, world_size)
    flat = keeps_gradients_flat(run.engine, sizes.ranks, parameters=1000)
    return deepspeed_config(run.engine, sizes, run.optimizer.max_grad_norm, "bf16", load_universal=False, flat=flat)


def test_learning_rate_warms_up_and_ends_at_zero():
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=4)
    assert [learning_rate(cosine, step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(cosine, 52, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0)
    linear = OptimizerConfig(learning_rate=2.0, schedule="linear")
    assert learning_rate(linear, 25, 100) == pytest.approx(1.5)
    assert learning_rate(OptimizerConfig(learning_rate=3.0), 99, 100) == 3.0


def test_batch_arithmetic_reaches_deepspeed():
    tree = settings(config(), world_size=2)
    assert tree["train_batch_size"] == 8
    assert tree["train_micro_batch_size_per_gpu"] == 2
    assert tree["gradient_accumulation_steps"] == 2
    assert tree["bf16"]["enabled"] and "fp16" not in tree
    assert tree["zero_optimization"]["stage"] == 2


def test_offload_reaches_deepspeed_without_its_compiled_optimizer():
    offloaded = config(engine=dict(zero_stage=3, offload_optimizer=True, offload_parameters=True))
    tree = settings(offloaded, world_size=1)
    assert tree["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert tree["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert tree["zero_force_ds_cpu_optimizer"] is False


def test_half_precision_gradients_are_added_up_in_fp32_over_micro_batches_and_ranks():
    for engine in (dict(zero_stage=3), dict(zero_stage=1, offload_optimizer=True)):  # elsewhere FlatGradients does
        tree = settings(config(engine=engine), world_size=2)
        assert tree["data_types"] == {"grad_accum_dtype": "fp32"} and tree["communication_data_type"] == "fp32"
    tree = settings(config(), world_size=2)
    assert "data_types" not in tree and "communication_data_type" not in tree


def test_gradients_are_kept_flat_where_the_stage_keeps_them_whole_anyway():
    stage = {number: EngineConfig(zero_stage=number) for number in (0, 1, 2, 3)}
    large = FLAT_ELEMENTS + 1
    assert keeps_gradients_flat(stage[1], 8, large) and keeps_gradients_flat(stage[2], 8, FLAT_ELEMENTS)
    assert keeps_gradients_flat(stage[2], 1, large)
    assert not keeps_gradients_flat(stage[2], 8, large)  # DeepSpeed reduces these while the backward pass goes on
    assert not keeps_gradients_flat(stage[0], 8, 10) and not keeps_gradients_flat(stage[3], 8, 10)
    assert not keeps_gradients_flat(EngineConfig(zero_stage=2, offload_optimizer=True), 1, 10)


def test_fp16_where_losses_are_not_scaled_is_refused_with_what_can_be_used():
    with pytest.raises(ValueError, match="needs a GPU. On a CPU use bf16, fp32, or auto"):
        resolve_precision("fp16", torch.device("cpu"), zero_stage=2)
    with pytest.raises(ValueError, match="needs engine.zero_stage 1, 2 or 3"):
        resolve_precision("fp16", torch.device("cuda"), zero_stage=0)


def test_a_precision_that_is_asked_for_is_taken():
    assert resolve_precision("bf16", torch.device("cpu"), 2) == "bf16"
    assert resolve_precision("fp32", torch.device("cpu"), 2) == "fp32"
    assert resolve_precision("auto", torch.device("cpu"), 2) in ("bf16", "fp32")


def test_a_rank_may_have_as_many_files_open_as_the_system_lets_it():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
