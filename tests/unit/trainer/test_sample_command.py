"""`controlbooth sample` on the built-in base and ControlNets that a test makes."""

import logging

import cv2
import numpy as np
import pytest
import torch

from controlbooth.launch.commands.data_pack import main as pack
from controlbooth.launch.commands.sample import main
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.noise.checks import SAMPLERS
from controlbooth.models.noise.process import FlowMatching
from controlbooth.models.noise.schedules import SCHEDULERS
from controlbooth.models.pretrained import load_base, load_controlnet, save_controlnet
from controlbooth.models.sampling import Control, residuals_of
from controlbooth.models.text import encode_with_dropout
from controlbooth.trainer.evaluation.sample import parse_control, to_conditioning

FEW = ["--base", "miniature", "--steps", "2", "--count", "2"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Two ControlNets whose residuals are not zero, shards with both conditions, and one picture of edges."""
    folder = tmp_path_factory.mktemp("studio")
    base = load_base("miniature")
    torch.manual_seed(0)
    for name in ("edges", "depth"):
        controlnet = build_controlnet(base.denoiser)
        with torch.no_grad():
            for parameter in controlnet.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        save_controlnet(controlnet, folder / name)
    kinds = ["--condition", "edges", "--condition", "depth"]
    pack(["--scenes", "4", *kinds, "-o", str(folder / "shards")])
    edges = np.zeros((64, 64), np.uint8)
    cv2.circle(edges, (32, 32), 20, 255)
    cv2.imwrite(str(folder / "edges.png"), edges)
    return folder


def pictures(folder):
    return [cv2.imread(str(path)) for path in sorted(folder.glob("0*.png"))]


@pytest.mark.slow
def test_two_controls_make_other_pictures_than_each_alone(studio, tmp_path, capsys):
    edges, depth = (["--control", f"{kind}={studio / kind}"] for kind in ("edges", "depth"))
    data = ["--data", str(studio / "shards")]
    for name, controls in (("edges", edges), ("depth", depth), ("both", edges + depth)):
        assert main([*controls, *data, *FEW, "-o", str(tmp_path / name)]) == 0
        assert len(pictures(tmp_path / name)) == 2 and (tmp_path / name / "grid.png").exists()
    assert "2 pictures" in capsys.readouterr().out
    one, other, both = (pictures(tmp_path / name)[0] for name in ("edges", "depth", "both"))
    assert (both != one).any() and (both != other).any()


def test_diffusers_has_nothing_to_warn_of_where_a_control_takes_the_dtype_of_its_base(studio, tmp_path):
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    try:
        control = ["--control", f"edges={studio / 'edges'}", "--data", str(studio / "shards")]
        assert main([*control, *FEW, "-o", str(tmp_path)]) == 0
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert told == []


@pytest.mark.slow
def test_pictures_of_a_file_and_a_prompt_are_repeatable_and_scale_and_schedule_change_them(studio, tmp_path):
    def draw(name, control, *more):
        given = ["--condition", f"edges={studio / 'edges.png'}", "--prompt", "a red ball", *FEW]
        assert main(["--control", control, *given, *more, "-o", str(tmp_path / name)]) == 0
        return pictures(tmp_path / name)

    control = f"edges={studio / 'edges'}"
    plain = draw("plain", control)
    assert len(plain) == 2 and (plain[0] != plain[1]).any()
    assert all(np.array_equal(a, b) for a, b in zip(plain, draw("again", control), strict=True))
    assert (draw("half", f"{control}:0.5")[0] != plain[0]).any()
    assert (draw("resolution", control, "--schedule", "resolution")[0] != plain[0]).any()
    assert (draw("guess", control, "--guess")[0] != plain[0]).any()


def test_resolution_weights_are_64_over_the_height_in_the_branch_with_the_prompt_and_0_in_the_other(studio):
    edges = cv2.cvtColor(cv2.imread(str(studio / "edges.png")), cv2.COLOR_BGR2RGB)
    conditioning = to_conditioning([edges, edges])
    base = load_base("miniature")
    network = load_controlnet(studio / "edges", base.denoiser).eval()
    with torch.no_grad():
        noise = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
        text = encode_with_dropout(base, ["", "", "a red ball", "a red ball"], picture_size=(64, 64))
        both = residuals_of(Control(network, conditioning), noise, torch.tensor(500), text)
        for schedule, most in (("resolution", 1.0), ("resolution/8", 2.0)):
            source = parse_control("edges=anywhere", [schedule], guess=False)
            control = Control(network, conditioning, source.scale, source.schedule, source.branches)
            ours = residuals_of(control, noise, torch.tensor(500), text)
            heights = [residual.shape[-2] for residual in both.each()]
            assert (heights[0], heights[-1]) == (8, 4)
            for plain, weighed, height in zip(both.each(), ours.each(), heights, strict=True):
                assert not weighed[:2].any()
                torch.testing.assert_close(weighed[2:], 8 / height / most * plain[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control", "edges"], "write KIND=FOLDER"),
        (["--control", "edges={}/edges"], "say which base"),
        (["--control", "edges=/nowhere"], "--control names /nowhere, which does not exist"),
        (["--control", "edges={}/shards", "--base", "miniature"], "shards is neither a run"),
        (["--control", "edges=a", "--control", "edges=b"], "name each kind once"),
        (["--control", "edges={}/edges", "--base", "miniature"], "given for nothing, and the controls are: edges"),
        (["--control", "edges=a", "--schedule", "cubic"], "'cubic' is not known. Use uniform"),
        (
            ["--control", "pose={}/edges", "--base", "miniature", "--data", "{}/shards"],
            "conditions there are: depth, edges",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(studio, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        main([*(text.format(studio) for text in arguments), "-o", str(tmp_path / "out")])


def test_a_scale_is_what_follows_the_last_colon_if_it_is_a_number():
    assert parse_control("canny=runs/a:0.8", [], False).scale == 0.8
    odd = parse_control("canny=C:/runs/a", ["depth=resolution", "canny=logspace"], False)
    assert (str(odd.where), odd.scale, odd.schedule) == ("C:/runs/a", 1.0, "logspace")
    assert parse_control("canny=a", [], True).branches == "conditional"


def test_the_command_line_knows_the_schedulers_that_there_are():
    assert set(SAMPLERS) == {*SCHEDULERS, *FlowMatching.samplers}
