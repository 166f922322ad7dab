"""Adding conditions to shards, by functions and by tiny networks of transformers' own classes."""

import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
import transformers
import webdataset

from controlbooth.data.conditions import networks
from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.loading.held_out import held_out
from controlbooth.data.order.draws import content_hash
from controlbooth.data.packing.annotate import annotate_shard
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.processes.pool import WorkerError
from controlbooth.data.scenes import render
from controlbooth.data.shards import manifest
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.sequential import samples_of
from controlbooth.launch.commands.data_annotate import main

SHARDS, PER_SHARD, SIZE = 4, 5, 48


@pytest.fixture
def shards(tmp_path):
    """20 scenes with captions and a part that nobody knows."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), encoder=False, mtime=0) as writer:
            for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                drawn = render.render(render.scene(1, i), SIZE)
                parts = {"png": encode_png(drawn.image), "txt": b"a scene", "meta.bin": bytes([i])}
                writer.write({"__key__": f"k{i:02d}", **parts})
        ensure_index(folder / f"{shard}.tar")
    return folder


def annotate(shards, out, *conditions, workers=1):
    named = [word for kind in conditions for word in ("--condition", kind)]
    return main([str(shards), "-o", str(out), *named, "--workers", str(workers)])


def everything(folder):
    return {key: parts for path in sorted(folder.glob("*.tar")) for key, parts in samples_of(path)}


@pytest.mark.slow
def test_all_parts_are_kept_and_each_condition_is_that_of_its_picture(shards, tmp_path):
    assert annotate(shards, tmp_path / "out", "canny_random", "gray", workers=2) == 0
    before, after = everything(shards), everything(tmp_path / "out")
    assert before.keys() == after.keys() and len(after) == SHARDS * PER_SHARD
    for key, parts in after.items():
        assert before[key].items() <= parts.items()
        assert parts.keys() - before[key].keys() == {"cond.canny_random.png", "cond.gray.png"}
        picture = cv2.imdecode(np.frombuffer(parts["png"], np.uint8), cv2.IMREAD_COLOR_RGB)
        found = cv2.imdecode(np.frombuffer(parts["cond.canny_random.png"], np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(found, CONDITIONS["canny_random"](picture, content_hash(parts["png"])))
    dataset = manifest.open_dataset(tmp_path / "out")
    assert dataset.samples_per_shard("canny_random").sum() == SHARDS * PER_SHARD
    assert len(list(held_out(dataset, 3, condition="gray", resolution=32))) == 3


def test_ranks_share_the_shards_and_write_what_one_would(shards, tmp_path, monkeypatch, capsys):
    annotate(shards, tmp_path / "one", "lines")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        annotate(shards, tmp_path / "three", "lines")
        assert (tmp_path / "three" / manifest.NAME).exists() == (rank == 2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_killed_annotate_goes_on_and_ends_with_the_same_bytes(shards, tmp_path):
    annotate(shards, tmp_path / "whole", "scribble")
    command = [
        sys.executable,
        "-m",
        "controlbooth.launch.cli",
        "data",
        "annotate",
        str(shards),
        "-o",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen([*command, "--condition", "scribble", "--workers", "1"])
    while not (tmp_path / "killed" / "0.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (tmp_path / "killed" / "0.tar").stat().st_mtime_ns
    assert annotate(shards, tmp_path / "killed", "scribble") == 0
    assert (tmp_path / "killed" / "0.tar").stat().st_mtime_ns == first
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


def test_writers_of_one_shard_with_one_process_id_do_not_write_into_each_others_file(shards, tmp_path):
    out, waiting = tmp_path / "out", [True]
    annotate(shards, out, "gray")
    path, expected = out / "0.tar", (out / "0.tar").read_bytes()
    path.unlink()

    def gray_after_the_other(picture, sample_hash):
        if waiting and waiting.pop():
            assert annotate_shard(shards / "0.tar", path, {"gray": CONDITIONS["gray"]}) == []
            assert path.read_bytes() == expected
        return CONDITIONS["gray"](picture, sample_hash)

    assert annotate_shard(shards / "0.tar", path, {"gray": gray_after_the_other}) == []
    assert path.read_bytes() == expected


def test_a_target_that_cannot_be_decoded_is_kept_without_a_condition_and_named(tmp_path, capsys):
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as writer:
        good = encode_png(np.zeros((16, 16, 3), np.uint8))
        writer.write({"__key__": "good", "png": good, "txt": b"x"})
        writer.write({"__key__": "bad", "png": good[:40], "txt": b"x"})
    ensure_index(tmp_path / "0.tar")
    assert annotate(tmp_path, tmp_path / "out", "gray") == 0
    after = everything(tmp_path / "out")
    assert "cond.gray.png" in after["good"] and after["bad"].keys() == {"png", "txt"}
    told = capsys.readouterr()
    assert "no condition for" in told.err and "'bad'" in told.err and "gray (1)" in told.out


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["sketch"], "there are canny, .*by networks depth, normals, segmentation, pose"),
        (["depth"], "say where its model lies, depth=FOLDER"),
        (["canny=/models"], "each as KIND=FOLDER"),
        (["canny", "canny"], "given twice"),
        (["depth=/nowhere"], "/nowhere holds no config.json"),
        (["pose=/nowhere"], "give pose=FOLDER,DETECTOR"),
    ],
)
def test_conditions_that_cannot_be_made_are_refused_with_what_can(shards, tmp_path, conditions, message):
    with pytest.raises((ValueError, OSError), match=message):
        annotate(shards, tmp_path / "out", *conditions, workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why_and_not_that_it_was_killed(shards, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(WorkerError, match="model cannot be opened as transformers' AutoModelForDepthEstimation"):
        annotate(shards, tmp_path / "out", f"depth={tmp_path / 'model'}", workers=2)


def test_a_folder_of_other_conditions_or_the_shards_own_is_refused(shards, tmp_path):
    annotate(shards, tmp_path / "out", "gray")
    with pytest.raises(ValueError, match="other conditions"):
        annotate(shards, tmp_path / "out", "gray", "blur")
    with pytest.raises(ValueError, match="has a condition 'gray' already"):
        annotate(tmp_path / "out", tmp_path / "twice", "gray")
    with pytest.raises(ValueError, match="give another folder"):
        annotate(shards, shards, "gray")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models with random weights, as save_pretrained writes them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    small = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=37)
    depth = transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            **small,
            image_size=32,
            patch_size=16,
            neck_hidden_sizes=[16, 16, 32, 32],
            fusion_hidden_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            is_hybrid=False,
            reassemble_factors=[4, 2, 1, 0.5],
        )  # fmt: skip
    )
    segmentation = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=5,
        )  # fmt: skip
    )
    backbone = transformers.VitPoseBackboneConfig(**small, image_size=[64, 48], patch_size=[16, 16], part_features=8,
                                                  out_indices=[4])  # fmt: skip
    pose = transformers.VitPoseForPoseEstimation(
        transformers.VitPoseConfig(backbone_config=backbone, num_labels=17, scale_factor=4, use_simple_decoder=True)
    )
    detector = transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            **small,
            image_size=[64, 64],
            patch_size=16,
            num_detection_tokens=5,
            id2label={0: "cat", 1: "person"},
            label2id={"cat": 0, "person": 1},
        )  # fmt: skip
    )
    processors = {
        "depth": transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
        "segmentation": transformers.SegformerImageProcessor(size={"height": 32, "width": 32}),
        "pose": transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}),
        "detector": transformers.YolosImageProcessor(size={"height": 64, "width": 64}),
    }
    for name, model in dict(depth=depth, segmentation=segmentation, pose=pose, detector=detector).items():
        model.save_pretrained(folder / name)
        processors[name].save_pretrained(folder / name)
    return folder


def test_networks_from_folders_give_a_condition_of_the_pictures_size(models, shards, tmp_path):
    named = [f"depth={models}/depth", f"normals={models}/depth", f"segmentation={models}/segmentation"]
    assert annotate(shards, tmp_path / "out", *named, f"pose={models}/pose,{models}/detector") == 0
    for parts in list(everything(tmp_path / "out").values())[:4]:
        made = {
            kind: cv2.imdecode(np.frombuffer(parts[f"cond.{kind}.png"], np.uint8), cv2.IMREAD_UNCHANGED)
            for kind in networks.NETWORKS
        }
        assert all(picture.shape[:2] == (SIZE, SIZE) and picture.dtype == np.uint8 for picture in made.values())
        assert made["depth"].min() == 0 and made["depth"].max() == 255


def test_a_model_of_the_wrong_sort_is_refused(models):
    with pytest.raises(ValueError, match="cannot be opened as transformers' AutoModelForDepthEstimation"):
        networks.open_network("depth", str(models / "segmentation"))


def test_normals_of_a_plane_face_the_viewer_and_those_of_a_slope_lean():
    flat = networks.normals_of_depth(np.full((32, 32), 0.5, np.float32))
    assert (flat == [128, 128, 255]).all()
    slope = networks.normals_of_depth(np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1)))[8:-8, 8:-8]
    x, y, z = (slope.reshape(-1, 3).astype(float) / 127.5 - 1).T
    assert (x < -0.5).all() and (np.abs(y) < 0.01).all() and (z > 0.2).all()
    assert np.allclose(-x / z, 2.0 * 32 / 31, rtol=0.05)


def test_a_skeleton_joins_the_neck_between_the_shoulders_and_leaves_out_what_was_not_seen():
    points = np.zeros((17, 3))
    points[5], points[6], points[0] = (60, 40, 1), (20, 40, 1), (40, 10, 1)  # shoulders and nose
    drawing = np.zeros((96, 96, 3), np.uint8)
    networks.draw_skeleton(drawing, points)
    assert drawing[40, 40].any() and drawing[25, 40].any() and not drawing[60:].any()
    points[:, 2] = 0.1
    empty = np.zeros((96, 96, 3), np.uint8)
    networks.draw_skeleton(empty, points)
    assert not empty.any()


def test_colours_of_classes_are_distinct_and_begin_with_black():
    colours = networks.class_colours(150)
    assert len(np.unique(colours, axis=0)) == 150 and not colours[0].any()


def test_a_network_that_lacks_tensors_is_refused_before_it_draws_at_random(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models / "segmentation", tmp_path / "segmentation")
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(name for name in weights if name.endswith("weight"))[0]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder} lacks 1 tensors of its .*: what it would draw is random"):
        networks.open_network("segmentation", str(folder))
