"""What the plan says that DeepSpeed keeps, against the live storages of real engines on one rank and two."""

import pytest
from tiny import torchrun


@pytest.mark.parametrize(("processes", "precision"), [(2, "fp32"), (2, "bf16"), (1, "fp32"), (1, "bf16")])
def test_the_planned_memory_of_every_stage_is_that_of_a_real_engine(tmp_path, processes, precision):
    for stage, (planned, held) in torchrun(processes, "engine_memory", tmp_path, precision).items():
        assert held == pytest.approx(planned, rel=0.05), f"ZeRO-{stage}: planned {planned}, held {held}"
