"""`controlbooth evaluate` on the built-in base and a ControlNet that a test makes, which has no run."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from controlbooth import launch
from controlbooth.data.scenes import render
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.commands.data_annotate import main as annotate
from controlbooth.launch.commands.data_pack import main as pack
from controlbooth.launch.commands.evaluate import main
from controlbooth.launch.commands.report import main as report_main
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.pretrained import load_base, save_controlnet
from controlbooth.trainer.config.loading import build_config, load_config
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.build import build
from controlbooth.trainer.engine.distributed import World, join, leave
from controlbooth.trainer.evaluation.distribution import LEAST_FOR_FID, fid, kid, open_measures
from controlbooth.trainer.evaluation.drawing import generate, rows_of
from controlbooth.trainer.evaluation.extract import extractor, fidelity
from controlbooth.trainer.evaluation.held_out import AT_ONCE, load_held_out
from controlbooth.trainer.evaluation.verdict import judge_run
from controlbooth.trainer.run.attempt import only_run
from controlbooth.trainer.run.watchdog import watching

FEW = ["--base", "miniature", "--samples", "10", "--steps", "2"]


@pytest.fixture(autouse=True)
def _alone():
    yield
    leave()  # evaluate leaves by itself, and a test that raises inside may not


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    base = load_base("miniature")
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)
    save_controlnet(controlnet, folder / "depth")
    kinds = ["--condition", "edges", "--condition", "depth", "--condition", "segmentation"]
    pack(["--scenes", "12", *kinds, "-o", str(folder / "shards")])
    return folder


def run(studio, out, *more, kind="depth"):
    data = ["--data", str(studio / "shards"), "--condition", kind]
    assert main([str(studio / "depth"), *data, *FEW, "-o", str(out), *more]) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "evaluation.json").read_text()), rows


@pytest.fixture(scope="module")
def evaluated(studio, tmp_path_factory):
    """(folder, evaluation, samples, what was printed) of a ControlNet without its run: copy the folder to change it."""
    folder, printed = tmp_path_factory.mktemp("evaluation"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        result, rows = run(studio, folder)
    return folder, result, rows, printed.getvalue()


@pytest.mark.slow
def test_a_controlnet_without_its_run_is_measured_by_every_figure_of_its_kind(studio, evaluated):
    folder, result, rows, shown = evaluated
    assert "10 held-out conditions" in shown and "edge f1" in shown and "KID" not in shown
    assert f"\nFID: needs {LEAST_FOR_FID:,} pictures and there are 10" in shown
    assert len(rows) == 6 * 10 and len({row["key"] for row in rows}) == 10
    figures = result["figures"]
    assert set(figures["with control"]) >= {"edge_f1", "mask_iou", "depth_delta", "depth_rmse", "says_object_class"}
    real = figures["real pictures"]
    assert real["edge_f1"]["mean"] > 0.9 and real["depth_delta"]["mean"] > 0.9
    assert real["depth_delta"]["mean"] > figures["without control"]["depth_delta"]["mean"]
    assert all(one["low"] <= one["mean"] <= one["high"] for one in real.values() if "low" in one)
    for name in ("edge_f1", "mask_iou", "depth_delta", "depth_rmse"):
        assert real[name]["share"] == dict(mean=1.0, low=1.0, high=1.0)
        for own in figures.values():  # picture by picture, as the figure itself
            assert own[name]["chance"]["low"] <= own[name]["chance"]["mean"] <= own[name]["chance"]["high"]
            assert own[name]["share"]["low"] <= own[name]["share"]["mean"] <= own[name]["share"]["high"] <= 1.0
        own = [row["chance"][name] for row in rows if row["way"] == "random noise"]
        assert np.mean(own) == pytest.approx(figures["random noise"][name]["chance"]["mean"])
        assert abs(figures["random noise"][name]["share"]["mean"]) < 0.1
    assert "chance" not in real["says_background"] and "share" not in real["says_background"]
    for name in ("says_background", "says_object_class", "says_object_size"):  # picture by picture, as in a comparison
        read = [row[name] for row in rows if row["way"] == "with control"]
        assert np.mean(read) == pytest.approx(figures["with control"][name]["mean"])
    assert result["data_fingerprint"] == open_dataset(studio / "shards").fingerprint
    assert (result["base_digest"], result["resolution"]) == (load_base("miniature").digest, 64)
    assert result["networks"] == {}
    assert result["sets"]["FID"]["note"].startswith(f"needs {LEAST_FOR_FID:,} pictures and there are 10")
    assert (folder / "evaluation.png").exists() and len(json.loads((folder / "ends.json").read_text())["best"]) == 5


@pytest.mark.slow
def test_as_many_conditions_as_there_are_are_measured_where_nobody_says_how_many(studio, tmp_path):
    data = ["--data", str(studio / "shards"), "--condition", "depth", "--base", "miniature", "--steps", "1"]
    assert main([str(studio / "depth"), *data, "-o", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["samples"] == 12
    with pytest.raises(ConfigError, match="--samples 13 is more than the 12 that .*shards has with .*'depth': ask for"):
        main([str(studio / "depth"), *data, "--samples", "13", "-o", str(tmp_path)])


def test_a_run_of_subjects_is_neither_evaluated_nor_reported_but_told_its_own_verb(tmp_path):
    (tmp_path / "config.yaml").write_text("name: pets\nmodel: {base: miniature}\nsubjects_per_batch: 8\n")
    for verb in (main, report_main):
        with pytest.raises(ConfigError, match="is a DreamBooth run, not a run: .* its folder dreambooth measure"):
            verb([str(tmp_path)])


@pytest.mark.slow
def test_pictures_that_are_there_are_not_drawn_again_and_missing_ones_are(studio, evaluated, tmp_path):
    folder, first, rows, _ = evaluated
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert first["speed"]["drawn"] == 30
    again, same = run(studio, tmp_path)
    assert again["speed"]["drawn"] == 0 and same == rows
    lost = next((tmp_path / "pictures").glob("with-control-no-prompt-*")) / "000003.png"
    before = cv2.imread(str(lost))
    lost.unlink()
    some, same = run(studio, tmp_path)
    assert some["speed"]["drawn"] == AT_ONCE and same == rows  # its whole batch, so that it is the same picture
    assert np.array_equal(cv2.imread(str(lost)), before)
    other, _ = run(studio, tmp_path, "--guidance", "3")
    assert other["speed"]["drawn"] == 20  # without a prompt there is no guidance, so those are the same


def photographs(folder: Path, count: int = 4, first: int = 0) -> Path:
    """Pictures whose names and captions are not those of scenes. first: with another one, they are others."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        picture = render.render(render.scene(5, first + number), 64).image[..., ::-1]
        cv2.imwrite(str(folder / "images" / f"{number}.png"), picture)
        (folder / "images" / f"{number}.txt").write_text("a picture")
    return folder


@pytest.mark.parametrize("prefix", ["", "computed:"])
def test_control_by_the_edges_of_the_shipped_run_on_photographs_is_measured_against_them(prefix, tmp_path):
    kind = load_config(Path(launch.__file__).parent / "configs" / "sd15-edges.yaml").data.condition
    stored = [] if prefix else ["--condition", kind]
    pack([str(photographs(tmp_path / "photos")), *stored, "-o", str(tmp_path / "shards")])
    held = load_held_out(open_dataset(tmp_path / "shards"), 4, prefix + kind, 64)
    assert held.kind == kind and held.edges is not None
    assert np.array_equal(held.edges, held.conditions[..., 0])
    extract = extractor(held, {}, "cpu")
    own = fidelity(held.targets, held, range(4), extract).values["edge_f1"].mean()
    others = fidelity(held.targets[::-1], held, range(4), extract).values["edge_f1"].mean()
    assert own > 0.75 and others < 0.4


def test_edges_that_are_drawn_under_are_what_is_measured_whatever_others_the_shards_hold(tmp_path):
    kinds = ["--condition", "edges", "--condition", "canny"]
    pack(["--scenes", "4", *kinds, "-o", str(tmp_path)])
    for kind in ("edges", "canny", "computed:canny", "computed:canny_random"):
        held = load_held_out(open_dataset(tmp_path), 4, kind, 64)
        assert held.edges is not None and np.array_equal(held.edges, held.conditions[..., 0])


def test_masks_are_measured_of_scenes_and_not_of_photographs_with_a_coloured_segmentation(studio, tmp_path):
    photos = photographs(tmp_path / "photos")
    (photos / "conditions" / "segmentation").mkdir(parents=True)
    for number in range(4):
        colours = np.full((64, 64, 3), (120, 60, 0), np.uint8)  # BGR: red is 0 everywhere
        cv2.imwrite(str(photos / "conditions" / "segmentation" / f"{number}.png"), colours)
    pack([str(photos), "-o", str(tmp_path / "shards")])
    for kind in ("segmentation", "computed:gray"):
        held = load_held_out(open_dataset(tmp_path / "shards"), 4, kind, 64)
        assert "mask_iou" not in fidelity(held.targets, held, range(4), extractor(held, {}, "cpu")).values
    held = load_held_out(open_dataset(studio / "shards"), 4, "depth", 64)
    assert fidelity(held.targets, held, range(4), None).values["mask_iou"].mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("edges", "edge_f1"),
        ("canny_random", "edge_f1"),
        ("depth", "depth_delta"),
        ("segmentation", "segmentation_miou"),
    ],
)
def test_control_is_told_by_the_figure_of_the_trained_kind(kind, own, studio, tmp_path):
    stored = kind in ("edges", "depth", "segmentation")
    held = load_held_out(open_dataset(studio / "shards"), 4, kind if stored else f"computed:{kind}", 64)
    figures = fidelity(held.targets, held, range(4), extractor(held, {}, "cpu")).values
    assert figures.keys() >= {"edge_f1", "mask_iou", own}
    values = {f"validation/{name}": float(values.mean()) for name, values in figures.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict(time=0.0, step=3, metrics=values)) + "\n")
    assert judge_run(tmp_path, 4).figure == own


@pytest.mark.parametrize("kind", ["blur", "lines"])
def test_a_run_that_nothing_tells_control_of_cannot_be_asked_to_end_by_it(kind, tmp_path, base_folder):
    pack([str(photographs(tmp_path / "photos", 8)), "-o", str(tmp_path / "train")])
    assert annotate([str(tmp_path / "train"), "-o", str(tmp_path / "edges"), "--condition", "canny"]) == 0

    def begin(held_out):
        tree = dict(
            name="a-run", output=str(tmp_path), max_steps=8, global_batch_size=1, micro_batch_size=1,
            model=dict(base=str(base_folder("sd15")), controlnet="/nowhere", attention="math"),
            data=dict(shards=str(tmp_path / "train"), held_out=held_out, condition=f"computed:{kind}", resolution=64),
            validation=dict(samples=8, every_steps=1, grid=1, stop_after_convergence=2),
        )  # fmt: skip
        world = join()
        with only_run(tmp_path / "a-run", world) as attempt, watching(attempt, world, 900.0) as watchdog:
            build(build_config(tree), world, attempt, watchdog, None)

    pack([str(photographs(tmp_path / "other", 8, first=100)), "-o", str(tmp_path / "held")])
    message = "stop_after_convergence=2 would never end the run: no figure tells control of blur .*Leave it out, or put"
    with pytest.raises((ValueError, OSError), match=message if kind == "blur" else "/nowhere"):
        begin(str(tmp_path / "held"))
    with pytest.raises((ValueError, OSError), match="/nowhere"):  # it gets as far as the next thing that is wrong
        begin(str(tmp_path / "edges"))


@pytest.mark.slow
def test_pictures_without_control_are_as_large_as_the_others_where_the_base_makes_another_size(studio, tmp_path):
    result, _ = run(studio, tmp_path, "--resolution", "32", "--samples", "2")
    assert result["figures"]["without control"].keys() >= {"edge_f1"}
    assert {cv2.imread(str(path)).shape for path in tmp_path.glob("pictures/*/*.png")} == {(32, 32, 3)}


def test_what_a_validation_compares_with_is_as_large_as_its_conditions_and_is_what_an_ablation_draws(studio):
    held = load_held_out(open_dataset(studio / "shards"), 2, "depth", 32)
    config = ValidationConfig(samples=2, grid=1, sampling_steps=1)
    pictures = generate(load_base("miniature"), None, held, config, World(0, 1, 0, torch.device("cpu")))
    assert pictures.shape == held.targets.shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}", "--data", "{0}/shards"], "holds neither a run's config.yaml nor a ControlNet's config.json"),
        (["{0}/depth", "--data", "{0}/shards"], "without its run: say --condition, --base too"),
        (["{0}/depth", "--data", "{0}/shards", "--condition", "edges", "--base", "miniature", "--step", "3"], "no run"),
        (["{0}/depth", "--data", "{0}/shards", "--condition", "pose", *FEW], "pose"),
        (["{0}/depth", "--data", "{0}/shards", "--condition", "depth", *FEW, "--samples", "99"], "99"),
        (["{0}/depth", "--data", "{0}/shards", "--condition", "depth", *FEW, "--network", "depth"], "KIND=FOLDER"),
        (["{0}/depth", "--data", "{0}/shards", "--condition", "depth", *FEW, "--aesthetic", "x"], "CLIP's embedding"),
    ],
)
def test_what_cannot_be_measured_is_refused(studio, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*(one.format(studio) for one in arguments), "-o", str(tmp_path)])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--network", "edges=x", "no network makes it here"),
        ("--network", "depth=x", "x holds no config.json, so it is no model's folder"),
        ("--network", "normals={0}/depth", "finds normals, and pictures are compared in depth: leave it out"),
        ("--encoder", "foo=x", "'foo=x' is not understood; write dino=FOLDER or clip=FOLDER"),
    ],
)
def test_networks_and_encoders_that_would_not_be_used_are_refused(studio, option, value, message, tmp_path):
    data = ["--data", str(studio / "shards"), "--condition", "depth", *FEW]
    with pytest.raises(ValueError, match=message):
        main([str(studio / "depth"), *data, option, value.format(studio), "-o", str(tmp_path)])


def test_a_controlnet_of_another_base_is_refused(studio, load_tiny, tmp_path):
    save_controlnet(build_controlnet(load_tiny("sd15").denoiser), tmp_path / "other")
    data = ["--data", str(studio / "shards"), "--condition", "depth", *FEW]
    with pytest.raises(ValueError, match="was made for another base"):
        main([str(tmp_path / "other"), *data])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 8, 20, 64])
def test_ranks_share_whole_batches_and_every_row_is_drawn_once(world_size, count):
    ranks = [rows_of(World(rank, world_size, 0, torch.device("cpu")), count) for rank in range(world_size)]
    assert sorted(row for rows in ranks for row in rows) == list(range(count))
    assert all(len({row // AT_ONCE for row in rows} & {row // AT_ONCE for row in ranks[0]}) == 0 for rows in ranks[1:])


def test_kid_is_unbiased_and_fid_is_the_distance_of_gaussians():
    draw = torch.Generator().manual_seed(0)
    same = [kid(torch.randn(64, 16, generator=draw), torch.randn(64, 16, generator=draw)) for _ in range(20)]
    assert abs(float(np.mean(same))) < 0.02
    assert kid(torch.randn(64, 16, generator=draw) + 1.0, torch.randn(64, 16, generator=draw)) > 0.5
    real = torch.randn(LEAST_FOR_FID, 8, generator=draw)
    assert fid(real + 2.0, real) == pytest.approx(8 * 4.0, rel=1e-3)
    with pytest.raises(ValueError, match="FID needs 2,048 pictures"):
        fid(real[:100], real[:100])


def test_a_head_for_the_aesthetic_score_is_one_linear_layer(tmp_path):
    save_file({"weight": torch.zeros(3, 4)}, tmp_path / "head.safetensors")
    with pytest.raises(ConfigError, match="CLIP's embedding"):
        open_measures({}, tmp_path / "head.safetensors", torch.device("cpu"))
