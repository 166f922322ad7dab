"""When a subject is learnt, copied, and at its best, of figures written down by hand."""

import pytest

from controlbooth.trainer.dreambooth.measuring.overfitting import Course, course

REAL = dict(real=0.8, real_nearest=0.85)


def validation(step, fidelity, nearest=0.5, **more):
    return dict(step=step, fidelity=fidelity, nearest=nearest, **REAL, **more)


FIRST = validation(0, 0.4, 0.45)


def test_a_subject_is_learnt_from_the_step_on_from_which_it_stays_near_its_pictures():
    assert course([FIRST, validation(100, 0.5)]) == Course(None, None, None)
    assert course([FIRST, validation(100, 0.65)]) == Course(100, None, 100)
    assert course([FIRST, validation(100, 0.65), validation(200, 0.5)]).learnt is None
    assert course([FIRST, validation(100, 0.65), validation(200, 0.5), validation(300, 0.7)]) == Course(300, None, 300)


def test_it_overfits_from_the_step_on_from_which_what_is_drawn_is_nearer_to_its_pictures_than_these_are_to_each_other():
    good, copied = validation(100, 0.7, 0.8), [validation(step, 0.79, 0.9) for step in (200, 300)]
    assert course([FIRST, good, *copied]) == Course(100, 200, 100)
    assert course([FIRST, *copied]) == Course(200, 200, None)


def test_where_prompts_are_measured_a_picture_that_follows_its_prompt_is_no_copy():
    first = FIRST | dict(prompt=0.3)
    near = [validation(100, 0.75, 0.9, prompt=0.3), validation(200, 0.78, 0.9, prompt=0.2)]
    assert course([first, *near]) == Course(100, 200, 100)


def test_of_learnt_steps_the_best_is_nearest_to_the_subject_and_keeps_its_prompts():
    first = FIRST | dict(prompt=0.3)
    steps = [validation(100, 0.70, prompt=0.30), validation(200, 0.72, prompt=0.30), validation(300, 0.74, prompt=0.25)]
    assert course([first, *steps]).best == 200
    assert course([first, validation(100, 0.7, prompt=0.3), validation(200, 0.7, prompt=0.3)]).best == 100


@pytest.mark.parametrize(
    "validations",
    [
        [],
        [dict(step=0)],
        [validation(100, 0.7)],
        [dict(step=0, fidelity=0.4, nearest=0.4), dict(step=100, fidelity=0.7, nearest=0.7)],
        [validation(0, 0.79), validation(100, 0.8)],
    ],
)
def test_nothing_is_told_without_encoders_the_bases_figures_two_pictures_or_a_way_to_go(validations):
    assert course(validations) == Course(None, None, None)
