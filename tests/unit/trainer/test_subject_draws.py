"""What is random about a subject's steps: its own, and independent of other subjects, whatever they have in common."""

from pathlib import Path

import pytest
import torch

from controlbooth.models.text import encode_prompts
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.batches import Pictures, Training, make_batch
from controlbooth.trainer.dreambooth.manifest import Task

CONFIG = SubjectRunConfig.model_validate(
    dict(name="pets", model=dict(base="tiny"), resolution=32, instance_batch_size=2, prior=dict(images=5))
)


@pytest.fixture
def base(load_tiny):
    return load_tiny("sd15")


def training(base, name, step=0):
    """A subject in a slot, with the pictures, the class pictures and the prompts that all have here."""
    text = encode_prompts(base, ["a dog"], picture_size=(32, 32))
    draw = torch.Generator().manual_seed(0)
    instance, prior = (
        Pictures(torch.randn(count, 4, 4, 4, generator=draw), torch.ones(count, 4, 4, 4), text) for count in (3, 5)
    )
    task = Task(name, (Path("same"),), "dog", "sks", "a sks dog", "a dog", 100, 1e-4, 4)
    return Training(task, instance, prior, step=step)


def rows(batch):
    return batch.latents, batch.noise, batch.levels


def test_a_subject_draws_the_same_alone_and_in_any_company(base):
    """Two pictures and two class pictures of each, in the stack's order."""
    alone = rows(make_batch(CONFIG, base, [training(base, "rex", step=7)]))
    company = [training(base, "max"), training(base, "rex", step=7), training(base, "tom", step=3)]
    together = rows(make_batch(CONFIG, base, company))
    assert all(torch.equal(one, other[4:8]) for one, other in zip(alone, together, strict=True))


def test_ranks_that_share_a_subject_draw_what_one_would(base):
    whole = rows(make_batch(CONFIG, base, [training(base, "rex", step=7)]))
    halves = [rows(make_batch(CONFIG, base, [training(base, "rex", step=7)], slice(rank, rank + 1))) for rank in (0, 1)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.stack([first[0], second[0], first[1], second[1]]))


@pytest.mark.slow
def test_subjects_with_the_same_pictures_and_class_draw_independently_and_so_do_their_class_pictures(base):
    steps, late, noise = 60, [], []
    for step in range(steps):
        batch = make_batch(CONFIG, base, [training(base, name, step) for name in ("rex", "max", "tom", "ace")])
        late.append(2.0 * (batch.levels >= 500) - 1)
        noise.append(batch.noise.flatten(1))
    spread = (torch.stack(late).sum(dim=1) ** 2).mean() / 16  # 16 where all rows of a step draw alike
    assert abs(float(spread) - 1) < 5 * (2 / steps) ** 0.5
    flat = torch.cat(noise)  # 64 values of each of 960 rows
    alike = torch.corrcoef(flat).fill_diagonal_(0)
    assert float(alike.abs().max()) < 0.72  # 5.8 standard deviations
    order = {name: [training(base, name, step) for step in range(6)] for name in ("rex", "max")}
    latents = {
        name: torch.cat([make_batch(CONFIG, base, [one]).latents for one in steps]) for name, steps in order.items()
    }
    assert not torch.equal(latents["rex"], latents["max"])
