"""What is found before anything starts, and that all of it is found at once."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from repeated import write_repeated

from controlbooth.data.loading.plan import STATE_VERSION
from controlbooth.data.shards.sidecar import PART, SAMPLE, index_path, make_index, write_index
from controlbooth.launch.preflight import run as checks
from controlbooth.launch.preflight.data import find_shards
from controlbooth.launch.preflight.run import checkpoint_bytes, preflight
from controlbooth.launch.ranks.torchrun import Node
from controlbooth.models.files.weight_files import safetensors_header
from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.run import starting
from controlbooth.trainer.run.integrity import write_marker

EMPTY_TAR = bytes(1024)


def node(processes: int = 1, gpus: int = 0) -> Node:
    return Node(processes=processes, cores=2, gpus=gpus, head_port=29500)


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file whose header names float32 tensors of these shapes, and whose data is a hole."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


UNET = "unet/diffusion_pytorch_model.safetensors"


def write_folder(base: Path, families_own: str = '{"cross_attention_dim": 768}') -> None:
    """A diffusers folder that is whole as far as its files' names and headers tell."""
    write_safetensors(base / UNET, {"conv_in.weight": [250], "up_blocks.0.weight": [999]})
    write_safetensors(base / "vae/diffusion_pytorch_model.safetensors", {"encoder.conv_in.weight": [3]})
    texts = {"unet/config.json": families_own, "vae/config.json": '{"_class_name": "AutoencoderKL"}'}
    for suffix in ("", "_2"):
        write_safetensors(base / f"text_encoder{suffix}/model.safetensors", {"final_layer_norm.weight": [3]})
        texts[f"text_encoder{suffix}/config.json"] = '{"model_type": "clip_text_model"}'
        texts[f"tokenizer{suffix}/tokenizer.json"] = texts[f"tokenizer{suffix}/tokenizer_config.json"] = "{}"
    texts["scheduler/scheduler_config.json"] = '{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}'
    for name, text in texts.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)


@pytest.fixture
def good(tmp_path) -> dict:
    """A run in which there is nothing to find."""
    for name in ("train/a.tar", "train/b.tar", "held_out/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(EMPTY_TAR)
    write_folder(tmp_path / "base")
    return {
        "name": "first",
        "output": str(tmp_path / "runs"),
        "max_steps": 10,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "model": {"base": str(tmp_path / "base")},
        "data": {
            "shards": str(tmp_path / "train"),
            "held_out": str(tmp_path / "held_out"),
            "condition": "edges",
        },
    }


def config(tree: dict, **changes) -> RunConfig:
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (tree[section] if name else tree)[name or section] = value
    return build_config(tree)


def only_problem(tree: dict, where: Node | None = None, **changes) -> str:
    (problem,) = preflight(config(tree, **changes), where or node())
    return problem


def test_a_good_run_has_no_problem_and_leaves_no_trace(good, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert preflight(config(good), node()) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_are_found_at_once(good):
    problems = preflight(config(good, data__shards="nowhere", model__base="nothing", micro_batch_size=3), node())
    assert [problem.split()[0] for problem in problems] == ["global_batch_size=8", "data.shards", "model.base"]


def test_the_batch_must_divide_over_the_ranks(good):
    assert "2 * 3 = 6" in only_problem(good, node(processes=3))


def test_every_process_needs_a_gpu_of_its_own_where_there_are_gpus(good):
    assert "4 processes need as many GPUs, and this machine shows 2. Use --processes 2" in only_problem(
        good, node(processes=4, gpus=2)
    )


def test_fp16_needs_a_gpu(good):
    assert "Use bf16, fp32, or auto" in only_problem(good | {"engine": {"precision": "fp16"}})


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_kernels_that_only_cuda_has_need_a_gpu(good, kernel):
    assert f"model.attention is {kernel}, which needs CUDA" in only_problem(good, model__attention=kernel)
    assert preflight(config(good), node(gpus=1)) == []


def test_xformers_needs_a_gpu_and_the_package(good, monkeypatch):
    assert "has no CPU kernels" in only_problem(good, model__attention="xformers")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "controlbooth[cuda]"' in only_problem(good, node(gpus=1))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nowhere", "it does not exist"),
        ("nowhere/*.tar", "there are no .tar shards; correct the path, or write shards with `controlbooth data pack`"),
        ("nowhere-{000..009}.tar", "10 of 10 shards do not exist (first: nowhere-000.tar)"),
        ("nowhere-{000..009.tar", "the braces of 'nowhere-{000..009.tar' do not match"),
        ("s3://bucket/x.tar", "remote shards are indexed first: run `controlbooth data index s3://bucket/x.tar "),
    ],
)
def test_shards_that_are_not_there_are_named(good, location, message):
    problem = only_problem(good, data__shards=location)
    assert problem.startswith(f"data.shards is {location!r}: ") and message in problem


def test_shards_are_found_in_a_folder_a_glob_a_range_and_a_manifest(good, tmp_path):
    train = tmp_path / "train"
    both = [str(train / "a.tar"), str(train / "b.tar")]
    assert find_shards(str(train)) == find_shards(f"{train}/*.tar") == find_shards(f"{train}/{{a,b}}.tar") == both
    manifest = train / "manifest.jsonl"
    manifest.write_text('{"uri": "b.tar"}\n')
    assert find_shards(str(manifest)) == find_shards(str(train)) == both[1:]
    manifest.write_text('{"uri": "b.tar"}\n{"uri": "gone.tar"}\n')
    assert "gone.tar" in only_problem(good)
    manifest.write_text("not json\n")
    assert "line 1 of" in (problem := only_problem(good)) and "controlbooth data index" in problem


def test_a_manifest_of_remote_shards_is_taken_with_a_cache_and_refused_without(good, tmp_path):
    manifest = tmp_path / "remote.jsonl"
    manifest.write_text('{"uri": "s3://bucket/a.tar"}\n{"uri": "gs://bucket/b.tar"}\n')
    problem = only_problem(good, data__shards=str(manifest))
    assert "2 shards in a store (first: s3://bucket/a.tar), and data.cache is not set" in problem
    assert preflight(config(good, data__cache=str(tmp_path / "cache")), node()) == []
    assert "1 shards are both in" in only_problem(good, data__held_out=str(one_of(manifest, tmp_path)))


def test_a_cache_that_its_disk_cannot_hold_is_found_before_it_is_full(good, tmp_path, monkeypatch):
    manifest, cache = tmp_path / "remote.jsonl", tmp_path / "cache"
    manifest.write_text('{"uri": "s3://bucket/a.tar", "bytes": 8589934592}\n')
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(2**40, 0, 5 * 2**30))
    problem = only_problem(good, data__shards=str(manifest), data__cache=str(cache))
    assert f"{cache} will come to hold 8.0 GiB more, and its disk has 5.0 GiB free" in problem
    assert "lower data.cache_gib=100" in problem
    assert preflight(config(good, data__cache_gib=4), node()) == []
    cache.mkdir()
    with open(cache / "entry.tar", "wb") as file:
        file.truncate(4 * 2**30)  # a part of the 8 GiB is there, as a hole
    assert preflight(config(good, data__cache_gib=100), node()) == []
    (tmp_path / "file").touch()
    assert "is no folder that can be written to" in only_problem(good, data__cache=str(tmp_path / "file"))


def manifest_of(folder: Path, **changes) -> list[dict]:
    """Writes the manifest of the empty tars of a folder, and their indexes, of which only the digest is looked at."""
    rows = []
    for shard in sorted(folder.glob("*.tar")):
        digest = shard.name.encode().ljust(16)
        shard.with_name(f"{shard.name}.idx").write_bytes(bytes(40) + digest)
        row = {"uri": shard.name, "bytes": 1024, "index_hash": digest.hex(), "usable": 10, "conditions": {"edges": 9}}
        rows.append(row | changes)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_shards_and_indexes_that_are_not_as_the_manifest_says_are_named(good, tmp_path):
    train = tmp_path / "train"
    manifest_of(train)
    assert preflight(config(good), node()) == []
    (train / "a.tar").write_bytes(bytes(512))
    (train / "b.tar.idx").write_bytes(b"")
    problem = only_problem(good)
    assert f"{train / 'a.tar'} has 512 bytes, its index says 1024" in problem
    assert f"2 of 2 shards are not as they were indexed ({train}" in problem and "b.tar.idx is damaged" in problem
    assert f"`controlbooth data index --rebuild {train}`" in problem
    (train / "a.tar").write_bytes(EMPTY_TAR)
    (train / "b.tar.idx").unlink()
    assert "1 of 2 shards" in (problem := only_problem(good)) and "b.tar.idx is missing" in problem


def test_a_shard_without_a_manifest_that_was_cut_short_since_it_was_indexed_is_named(good, tmp_path):
    shard, none = tmp_path / "train" / "a.tar", (np.zeros(0, SAMPLE), np.zeros((0, 0), PART))
    write_index(make_index(4096, (), *none), index_path(shard))
    shard.write_bytes(b"x" * 2000)
    assert f"1 of 2 shards are cut short ({shard}): fetch or pack them again" in only_problem(good)
    index_path(shard).unlink()
    assert "cut short" in only_problem(good)
    for another in (bytes(2048), b"x" * 4096, b"x" * 5000):  # whole, as long as it was, or longer: to be indexed anew
        write_index(make_index(4096, (), *none), index_path(shard))
        shard.write_bytes(another)
        assert preflight(config(good), node()) == []


def test_shards_that_a_folder_holds_beside_its_manifest_are_named(good, tmp_path):
    manifest_of(tmp_path / "train")
    (tmp_path / "train" / "c.tar").touch()
    assert "lists 2 shards, and the folder holds 1 more" in (problem := only_problem(good)) and "c.tar" in problem
    assert preflight(config(good, data__shards=str(tmp_path / "train" / "manifest.jsonl")), node()) == []


def test_a_condition_that_no_sample_has_is_found_in_the_manifests(good, tmp_path):
    manifest_of(tmp_path / "train")
    manifest_of(tmp_path / "held_out", conditions={"depth": 20}, usable=20)
    assert f"no sample of {tmp_path / 'held_out'} has it; conditions there are: depth" in only_problem(good)
    assert f"no sample of {tmp_path / 'train'} has it" in only_problem(good, data__condition="depth")
    assert preflight(config(good, data__condition="computed:canny"), node()) == []


def test_more_lanes_than_samples_are_refused(good, tmp_path):
    manifest_of(tmp_path / "train")
    assert "18 usable samples, and each of the 24 lanes" in only_problem(good, data__lanes=24)
    assert "lower global_batch_size" in only_problem(good, data__lanes=None, global_batch_size=32)


def one_of(manifest: Path, folder: Path) -> Path:
    """A manifest of the first shard of another."""
    (folder / "one.jsonl").write_text(manifest.read_text().splitlines()[0] + "\n")
    return folder / "one.jsonl"


def test_an_empty_folder_has_no_shards(good, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "there are no .tar shards" in only_problem(good, data__held_out=str(tmp_path / "empty"))


def test_held_out_shards_must_not_be_trained_on_not_even_by_another_name(good, tmp_path):
    (tmp_path / "held_out/link.tar").symlink_to(tmp_path / "train/b.tar")
    problem = only_problem(good)
    assert "1 shards are both in data.shards and in data.held_out" in problem and "b.tar" in problem


def test_copies_of_trained_shards_under_other_names_are_not_held_out(good, tmp_path):
    """Equal names of shards and of samples are no matter."""
    training, held = (write_repeated(tmp_path / name, shards=2, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    good |= dict(global_batch_size=2)
    found = config(good, data__shards=str(training), data__held_out=str(held))
    assert preflight(found, node()) == []
    for suffix in (".tar", ".tar.idx"):
        shutil.copy(training / f"00001{suffix}", held / f"copy{suffix}")
    problem = only_problem(good)
    assert "1 shards of data.held_out hold the same samples as ones of data.shards" in problem
    assert "copy.tar and " in problem and "00001.tar" in problem


def test_a_run_of_a_version_that_drew_otherwise_is_told_how_to_go_on(good, tmp_path):
    def begun(version, step=4):
        saved = tmp_path / "runs" / "first" / "checkpoints" / f"step-{step:08d}"
        saved.mkdir(parents=True, exist_ok=True)
        state = dict(step=step, order=dict(version=version), zero_stage=2, precision="fp32", condition="edges")
        (saved / "state.json").write_text(json.dumps(state))
        (saved / "config.yaml").write_text(dump(config(good)))
        write_marker(saved)
        return saved, preflight(config(good), node())

    assert begun(STATE_VERSION)[1] == []
    saved, (problem,) = begun(2)
    assert "has version 2, and this controlbooth draws by version 3: up to 2, prompts were dropped by the" in problem
    assert problem.endswith(f"model.controlnet={saved}/controlnet")
    assert begun(2, step=10)[1] == []  # it is finished


def test_more_held_out_samples_than_there_are_are_refused_with_what_to_pack(good, tmp_path):
    manifest_of(tmp_path / "held_out", conditions={"edges": 5})
    problem = only_problem(good, validation={"samples": 8})
    assert problem.startswith("validation.samples=8, and ") and "holds 5 usable samples out" in problem
    assert "--held-out 8" in problem


def test_a_run_without_held_out_shards_is_allowed(good):
    assert preflight(config(good, data__held_out=None), node()) == []


def test_a_base_that_is_not_there_is_not_downloaded(good):
    assert "nothing is downloaded from a hub" in only_problem(good, model__base="runwayml/stable-diffusion-v1-5")


def test_a_folder_that_is_no_base_is_told_what_is_missing(good, tmp_path):
    (tmp_path / "base/unet/config.json").unlink()
    assert "give the folder of a whole Stable Diffusion model" in only_problem(good)


def test_a_base_without_safetensors_is_refused(good, tmp_path):
    (tmp_path / "base" / UNET).rename(tmp_path / "base/unet/diffusion_pytorch_model.bin")
    assert "safe_serialization=True" in only_problem(good)
    (tmp_path / "model.ckpt").touch()
    assert "no .safetensors file" in only_problem(good, model__base=str(tmp_path / "model.ckpt"))


def test_a_pointer_of_git_lfs_and_a_file_cut_short_are_recognised(good, tmp_path):
    file = tmp_path / "base" / UNET
    size = file.stat().st_size
    os.truncate(file, size - 4)
    assert f"has {size - 4} bytes where its header says {size}. Fetch it again" in only_problem(good)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n")
    assert "is not a safetensors file; a pointer of git-lfs is not its content" in only_problem(good)
    file.write_bytes(b"")
    assert "is not a safetensors file" in only_problem(good)


def test_a_family_that_cannot_be_is_refused(good, tmp_path):
    assert "holds Stable Diffusion 1.x. Use family 'sd15' or 'auto'" in only_problem(good, model__family="sdxl")
    (tmp_path / "base/unet/config.json").write_text('{"addition_embed_type": "text_time"}')
    assert "holds Stable Diffusion XL. Use family 'sdxl' or 'auto'" in only_problem(good, model__family="sd15")
    assert preflight(config(good, model__family="sdxl"), node()) == []


FOREIGN = {  # what lies in a folder that is no supported base -> what is said of it
    "transformer/config.json": (
        '{"_class_name": "PixArtTransformer2DModel"}',
        "(PixArt): the base's",
    ),
    "model_index.json": ('{"_class_name": "FluxPipeline"}', "(FLUX)"),
    "unet/config.json": ('{"in_channels": 9, "out_channels": 4}', "9 channels and predicts 4: an inpainting model"),
    "vae/config.json": ('{"_class_name": "AutoencoderTiny"}', "is of the class AutoencoderTiny"),
    "text_encoder/config.json": ('{"model_type": "roberta_series"}', "a model of the type 'roberta_series'"),
    "scheduler/scheduler_config.json": ('{"_class_name": "EDMEulerScheduler"}', "says EDM's noise levels"),
    "tokenizer/tokenizer_config.json": ('{"model_max_length": "77"}', "model_max_length is '77'"),
}


@pytest.mark.parametrize("file", FOREIGN)
def test_a_folder_that_is_no_supported_base_is_told_what_it_is(good, tmp_path, file):
    text, told = FOREIGN[file]
    if file in ("transformer/config.json", "model_index.json"):
        (tmp_path / "base/unet/config.json").unlink()
        (tmp_path / "base/transformer").mkdir()
        (tmp_path / "base/transformer/config.json").write_text('{"_class_name": "SomeTransformer"}')
    (tmp_path / "base" / file).write_text(text)
    problem = only_problem(good)
    assert told in problem and problem.startswith(f"model.base is {str(tmp_path / 'base')!r}: ")


@pytest.mark.parametrize(
    ("tensor", "shape", "told"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", [2, 2], "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", [2, 2], "Flux or a relative of it"),
        ("model.diffusion_model.adaln_single.linear.weight", [2, 2], "PixArt or a relative of it"),
        ("clip_txt_pooled_mapper.weight", [2, 2], "Stable Cascade"),
        ("edm_vpred.sigma_max", [], "a model of EDM's noise levels"),
        ("control_model.input_hint_block.0.weight", [2, 3, 3, 3], "a ControlNet, not a base model"),
        ("lora_unet_down_blocks_0.lora_up.weight", [2, 2], "a LoRA, not a base model"),
        ("down_blocks.0.resnets.0.conv1.weight", [2, 2, 3, 3], "a single module in diffusers' layout"),
        ("encoder.down.0.block.0.conv1.weight", [2, 2, 3, 3], "a VAE alone"),
        ("model.diffusion_model.input_blocks.0.0.weight", [2, 9, 3, 3], "takes 9 channels: an inpainting model"),
        ("model.diffusion_model.input_blocks.0.0.weight", [2, 4, 3, 3], "holds no text encoder"),
        ("something.weight", [2], "no whole Stable Diffusion checkpoint"),
    ],
)
def test_a_single_file_that_is_no_supported_base_is_told_what_it_is(good, tmp_path, tensor, shape, told):
    write_safetensors(tmp_path / "model.safetensors", {tensor: shape})
    problem = only_problem(good, model__base=str(tmp_path / "model.safetensors"))
    assert told in problem and str(tmp_path / "model.safetensors") in problem


def test_a_file_of_a_transformer_needs_beside_it_what_it_does_not_hold(good, tmp_path):
    file, prefix = tmp_path / "sd3" / "model.safetensors", "model.diffusion_model."
    shapes = {
        f"{prefix}x_embedder.proj.weight": [16, 4, 2, 2],
        f"{prefix}final_layer.linear.weight": [16, 16],
        f"{prefix}pos_embed": [1, 4, 16],
        f"{prefix}joint_blocks.0.x_block.attn.qkv.bias": [48],
        "first_stage_model.encoder.conv_in.bias": [4],
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": [4],
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias": [4],
    }
    write_safetensors(file, shapes)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(tmp_path / "base" / "tokenizer", file.parent / name)
    problem = only_problem(good, model__base=str(file))
    assert "holds no T5, and there is no text_encoder_3/ beside it" in problem and "model.t5: false" in problem
    assert preflight(config(good, model__t5=False), node()) == []
    (file.parent / "text_encoder_3").mkdir()
    (file.parent / "text_encoder_3" / "config.json").write_text('{"model_type": "t5"}')
    assert "text_encoder_3 holds no .safetensors file" in only_problem(good, model__t5=True)
    write_safetensors(file.parent / "text_encoder_3" / "model.safetensors", {"shared.weight": [4, 4]})
    assert preflight(config(good), node()) == []


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_not_there_is_named(good, tmp_path, part):
    shutil.rmtree(tmp_path / "base" / part)
    assert all(part in problem for problem in preflight(config(good), node())) and preflight(config(good), node())


@pytest.mark.parametrize(
    ("channels", "kind", "told"),
    [
        (1, "ControlNetModel", "its conditioning_channels is 1, and conditions here are RGB"),
        (3, "ControlNetUnionModel", "holds a ControlNetUnionModel, which is no ControlNet that is known"),
        (3, "ControlNetXSAdapter", "holds a ControlNetXSAdapter"),
        (3, "SanaControlNetModel", "holds a SanaControlNetModel"),
        (3, "ControlNetModel", None),
    ],
)
def test_a_controlnet_that_cannot_be_gone_on_from_is_told_before_a_start(good, tmp_path, channels, kind, told):
    folder = tmp_path / "net"
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", {"conv_in.weight": [3]})
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, "conditioning_channels": channels}))
    good["model"]["controlnet"] = str(folder)
    assert preflight(config(good), node()) == [] if told is None else told in only_problem(good)


def test_a_controlnet_to_go_on_from_must_exist(good, tmp_path):
    assert "or 'unet' to start one from the base" in only_problem(good, model__controlnet="nothing")
    assert "holds a None, which is no ControlNet" in only_problem(good, model__controlnet=str(tmp_path / "base/unet"))
    problem = only_problem(good, model__controlnet=str(tmp_path / "base"))
    assert problem.startswith(f"model.controlnet is '{tmp_path / 'base'}', which holds no config.json")
    assert "is no .safetensors file" in only_problem(good, model__controlnet=str(tmp_path / "base/unet/config.json"))


def test_the_output_must_be_a_folder_that_can_be_written(good, tmp_path, monkeypatch):
    (tmp_path / "runs").touch()
    assert "runs is a file. Change output or name" in only_problem(good)
    (tmp_path / "runs").unlink()

    def refused(folder):  # as root may write everywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(starting, "know_locks", refused)
    assert f"{tmp_path} is not writable (Read-only file system). Change output" in only_problem(good)


def test_checkpoints_are_estimated_from_the_copied_half_of_the_base(good, tmp_path):
    assert checkpoint_bytes(config(good)) == 250 * 16  # a weight, its fp32 copy, two moments of Adam
    assert checkpoint_bytes(config(good, optimizer={"ema_decay": 0.999})) == 250 * 20
    shutil.copy(tmp_path / "base" / UNET, (tmp_path / "base" / UNET).with_suffix(".fp16.safetensors"))
    assert checkpoint_bytes(config(good)) == 250 * 20
    single = tmp_path / "single.safetensors"
    prefix = "model.diffusion_model."
    write_safetensors(single, {f"{prefix}input_blocks.0.weight": [10, 10], f"{prefix}output_blocks.0.weight": [99]})
    assert checkpoint_bytes(config(good, model__base=str(single), optimizer={})) == 100 * 16
    unlocked = config(good, model={"base": str(single), "unlock_decoder_at": 1})
    assert checkpoint_bytes(unlocked) == 199 * 16  # the decoder too


def test_a_disk_that_is_too_small_for_the_checkpoints_is_found_with_numbers(good, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "base" / UNET, {"down_blocks.0.weight": [2**30 // 16]})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(2**40, 0, 3 * 2**30))
    problem = only_problem(good)
    assert "4 checkpoints of about 1.0 GiB need 4.0 GiB more" in problem and "3.0 GiB free" in problem
    assert preflight(config(good, checkpoint={"keep": 1}), node()) == []
    existing = tmp_path / "runs/first/checkpoints/step-1"
    existing.mkdir(parents=True)
    with (existing / "weights").open("wb") as file:
        file.truncate(2**30)  # a resumed run has some of its checkpoints already
    assert preflight(config(good, checkpoint={"keep": 2}), node()) == []


def test_a_header_is_read_without_the_data(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": [2, 3], "b": []})
    header = safetensors_header(tmp_path / "x.safetensors")
    assert {name: entry["shape"] for name, entry in header.items()} == {"a": [2, 3], "b": []}


def test_a_latent_cache_that_was_never_computed_is_found_before_a_start(good, tmp_path):
    good["data"]["latent_cache"] = str(tmp_path / "latents")
    (problem,) = preflight(config(good), node())
    assert f"data.latent_cache is {tmp_path / 'latents'}" in problem and "`controlbooth data precompute`" in problem
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "columns.json").write_text("{}")
    assert preflight(config(good), node()) == []


def test_a_shard_of_a_latent_cache_that_is_not_as_long_as_its_index_says_is_found_before_a_start(good, tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    (folder / "columns.json").write_text("{}")
    good["data"]["latent_cache"] = str(folder)
    none = np.zeros(0, SAMPLE), np.zeros((0, 0), PART)
    for name in ("a", "b"):
        (folder / f"{name}.latents-0.tar").write_bytes(bytes(512))
        write_index(make_index(512, (), *none), folder / f"{name}.latents-0.tar.idx")
    (folder / "unfinished.text-0.tar").write_bytes(bytes(512))
    assert preflight(config(good), node()) == []
    (folder / "a.latents-0.tar").write_bytes(bytes(100))
    (folder / "b.latents-0.tar.idx").write_bytes(b"")
    problem = only_problem(good)
    assert "2 of its shards are damaged" in problem
    assert "a.latents-0.tar has 100 bytes, its index says 512" in problem
    assert "b.latents-0.tar.idx is not a whole index" in problem and "`controlbooth data precompute`" in problem


def test_a_folder_that_a_training_holds_is_found_before_a_start(good, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert only_problem(good).startswith(f"{run} is in use by another training. Wait for it, stop it")
        (run / "attempt.json").write_text(json.dumps(dict(number=1, process=77, host="n1", time=1e9)))
        who = r"by another training \(process 77 on n1, since 2001-09-0\d \d\d:\d\d:40\)\. Wait for it"
        assert re.search(who, only_problem(good))
        monkeypatch.setenv("CONTROLBOOTH_ATTEMPT", "2")
        assert preflight(config(good), node()) == []
    monkeypatch.delenv("CONTROLBOOTH_ATTEMPT")
    assert preflight(config(good), node()) == []
