"""Latent caches are computed with tiny real bases, and a step on one is compared with a step without, bit for bit."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import stores
import torch
import webdataset

from controlbooth.data.errors import UserError
from controlbooth.data.scenes import render
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.latent_cache import check_stated, missing, open_latent_cache, plan_latent_cache, state
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.sidecar import index_path
from controlbooth.launch.cli import main
from controlbooth.launch.commands import data_index
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.pretrained import load_base, save_controlnet
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.build import (
    cached_values,
    make_loader,
    new_controlnet,
    open_run_latent_cache,
)
from controlbooth.trainer.controlnet.precompute import (
    all_damaged,
    check_apart,
    check_room,
    compute,
    lacking_kinds,
    only_writer,
    report,
    run_buckets,
    sample_bytes,
)
from controlbooth.trainer.controlnet.step import controlnet_step, prediction_and_target, to_device
from controlbooth.trainer.encoding import computed_here, latent_cache_identities, module_digest, tokenizer_digest
from controlbooth.trainer.engine.distributed import World, join, leave
from controlbooth.trainer.run.base import open_base

ALONE = World(0, 1, 0, torch.device("cpu"))
PER_SHARD, SHARDS = 7, 3  # 7: the last batch of a shard is not full


def encode(extension, pixels):
    return cv2.imencode(f".{extension}", pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()


def write_shards(folder, size, damaged=(), spoiled=()):
    """Scenes of `size(i)` (height, width); every third has two captions, every fifth an empty one.

    Of those that are `spoiled` the edges cannot be decoded, and of those that are `damaged` the picture.
    """
    folder.mkdir()
    for shard in range(SHARDS):
        path = folder / f"{shard}.tar"
        with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
            for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                drawn = render.render(render.scene(3, i), 48)
                height, width = size(i)
                image, edges = (cv2.resize(one, (width, height)) for one in (drawn.image, drawn.edges))
                png = encode("png", image)
                captions = ["" if i % 5 == 0 else render.scene(3, i).caption] + ["another one"] * (i % 3 == 0)
                png = png[:90] + b"junk" if i in damaged else png
                lines = b"junk" if i in spoiled else encode("png", edges)
                parts = {"png": png, "cond.edges.png": lines, "cond.normals.png": encode("png", image)}
                writer.write({"__key__": f"k{i:03d}", "json": json.dumps({"captions": captions}).encode(), **parts})
        ensure_index(path)
    return folder


def run_config(base, folder, model=None, **data):
    changes = dict(
        shards=str(folder / "shards"), condition="edges", resolution=32, latent_cache=str(folder / "latents")
    )
    hints = dict(hint_channels=[8, 8, 8, 8]) if (base / "unet").is_dir() else {}
    return build_config(
        dict(
            name="run", output=str(folder / "runs"), max_steps=1, global_batch_size=4, micro_batch_size=2,
            model=dict(base=str(base)) | hints | (model or {}), data=changes | data, engine=dict(precision="fp32"),
        )
    )  # fmt: skip


def computed(config, base):
    """-> data set and its latent cache, as `precompute` writes them."""
    dataset = open_dataset(config.data.shards)
    buckets = run_buckets(config, dataset)
    identities = latent_cache_identities(config, base, buckets.shapes, cached_values(config, base, dataset))
    config.data.latent_cache.mkdir(exist_ok=True)
    state(config.data.latent_cache, identities, computed_here(config, ALONE.device))
    planned = plan_latent_cache(config.data.latent_cache, dataset, buckets, identities)
    jobs = lacking_kinds(planned, all_damaged(planned, ALONE))
    compute(config, ALONE, base, dataset, buckets, planned, jobs)
    return dataset, open_latent_cache(config.data.latent_cache, dataset, buckets, identities)


def both(config, base, dataset, latent_cache, steps):
    """The micro-batches without and with a latent cache."""
    config.output.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        plain, cached = (
            stack.enter_context(make_loader(config, ALONE, base, dataset, 0, config.output, latent_cache=chosen))
            for chosen in (None, latent_cache)
        )
        for _ in range(steps):
            yield from zip(next(plain).micro_batches, next(cached).micro_batches, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flip"),
    [
        ("sd15", True),
        ("sd15", False),
        ("sd21", False),
        ("sdxl", False),
        ("miniature", False),
        ("sd3", True),
        ("flux", False),
        ("miniature-dit", False),
    ],
)
def test_a_step_on_a_latent_cache_is_bitwise_the_step_without(base_folder, tmp_path, family, flip):
    write_shards(tmp_path / "shards", lambda i: (40, 48))
    config = run_config(base_folder(family), tmp_path, random_flip=flip)
    base = open_base(config, torch.float32, "cpu")
    dataset, latent_cache = computed(config, base)
    controlnet = moved_controlnet(base, config)
    seen, kept = set(), 0
    with torch.no_grad():
        for one, other in both(config, base, dataset, latent_cache, steps=6):
            assert other.pixel_values is None and one.keys == other.keys and one.captions == other.captions
            assert (other.conditioning is None) == (family in ("sd3", "flux")) and one.conditioning is not None
            assert np.array_equal(one.dropped, other.dropped)
            plain, cached = (to_device(batch, ALONE.device) for batch in (one, other))
            for a, b in zip(
                prediction_and_target(base, controlnet, plain),
                prediction_and_target(base, controlnet, cached),
                strict=True,
            ):
                assert torch.equal(a, b)
            seen |= set(one.keys)
            kept += sum(map(bool, one.captions))
    assert len(seen) > 16 and 0 < kept < 24


def moved_controlnet(base, config):
    """A ControlNet that is moved away from zero everywhere, so that what it adds depends on the condition."""
    torch.manual_seed(0)
    controlnet = new_controlnet(base.denoiser, config.model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return controlnet


def trained(base, config, dataset, latent_cache, steps):
    """Losses of some steps of AdamW from one beginning, and the weights after them."""
    controlnet = moved_controlnet(base, config).to(base.dtype)
    optimizer = torch.optim.AdamW(controlnet.parameters(), 1e-3)
    config.output.mkdir(exist_ok=True)
    losses = []
    with make_loader(config, ALONE, base, dataset, 0, config.output, latent_cache=latent_cache) as loader:
        for _ in range(steps):

            def backward(loss):
                (loss / 2).backward()

            losses += controlnet_step(base, controlnet, backward, next(loader).micro_batches, None, ALONE.device)
            optimizer.step()
            optimizer.zero_grad()
    return losses, controlnet.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "condition"), [("sd3", "edges"), ("sd3", "normals"), ("flux", "normals")])
def test_training_on_cached_latents_of_conditions_is_bitwise_training_without(
    base_folder, tmp_path, family, condition, dtype
):
    """With buckets of two shapes, pictures that are mirrored, and normals, whose colours turn in a mirror."""
    write_shards(tmp_path / "shards", lambda i: (16, 64) if i % 2 else (48, 48), spoiled=(4, 11))
    config = run_config(
        base_folder(family), tmp_path, condition=condition, random_flip=True, max_aspect_ratio=4.0, aspect_step=16,
        max_bad_rate=1.0,
    )  # fmt: skip
    base = open_base(config, dtype, "cpu")
    dataset, latent_cache = computed(config, base)
    (losses, weights), (others, theirs) = (trained(base, config, dataset, one, 6) for one in (None, latent_cache))
    assert latent_cache.condition == condition and len(set(losses)) == 12
    assert losses == others
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights.items())


def test_conditions_that_cannot_be_decoded_are_replaced_by_the_same_samples_with_their_latents(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32), spoiled=(2, 9, 10), damaged=(3,))
    config = run_config(base_folder("flux"), tmp_path, max_bad_rate=1.0)
    base = load_base(config.model.base)
    dataset, latent_cache = computed(config, base)
    pairs = list(both(config, base, dataset, latent_cache, steps=10))
    assert all(one.keys == other.keys and np.array_equal(one.weights, other.weights) for one, other in pairs)
    assert not {"k002", "k003", "k009", "k010"} & {key for one, _ in pairs for key in one.keys}


def written_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def test_latents_of_conditions_are_added_to_a_cache_that_lacks_them(base_folder, tmp_path):
    """As to one of before, and to one of a run on another condition, which goes on working."""
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd3"), tmp_path)
    pixels = run_config(base_folder("sd3"), tmp_path, dict(condition_entry="pixels", hint_channels=[4, 8, 8, 16]))
    base = load_base(config.model.base)
    dataset, before = computed(pixels, base)
    assert before.condition is None and set(before.paths) == {"latents", "text"}
    files = written_times(tmp_path / "latents")

    def opened(config):
        return open_run_latent_cache(config, ALONE, base, dataset)

    with pytest.raises(UserError, match="no latents of the condition 'edges', which .*those of pictures alone.*adds"):
        opened(config)
    _, edges = computed(config, base)
    added = written_times(tmp_path / "latents")
    assert files.items() <= added.items() and len(added) == 3 * SHARDS and edges.condition == "edges"
    normals = run_config(base_folder("sd3"), tmp_path, condition="normals")
    with pytest.raises(UserError, match="no latents of the condition 'normals'.*it has those of 'edges'.*which adds"):
        opened(normals)
    computed(normals, base)
    assert added.items() <= written_times(tmp_path / "latents").items()
    assert [opened(one).condition for one in (pixels, config, normals)] == [None, "edges", "normals"]
    with pytest.raises(UserError, match="has latents of the condition 'edges', and the loader reads 'normals'"):
        make_loader(normals, ALONE, base, dataset, 0, config.output, latent_cache=edges)


def test_latents_of_a_condition_that_was_resized_otherwise_are_refused(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd3"), tmp_path)
    base = load_base(config.model.base)
    computed(config, base)
    other = latent_cache_identities(config, base, ((32, 32),), "labels")
    with pytest.raises(ValueError, match="condition.edges have values='levels' there, and here 'labels'"):
        check_stated(tmp_path / "latents", other)


def test_a_controlnet_that_goes_on_wants_latents_of_conditions_where_it_reads_them(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    dataset, folders = open_dataset(tmp_path / "shards"), {}
    base = load_base(base_folder("sd3"))
    for entry in ("latents", "pixels"):
        config = run_config(base_folder("sd3"), tmp_path, dict(condition_entry=entry, hint_channels=[4, 8, 8, 16]))
        save_controlnet(new_controlnet(base.denoiser, config.model), folders.setdefault(entry, tmp_path / entry))
    found = [
        cached_values(run_config(base_folder("sd3"), tmp_path, dict(controlnet=str(folder))), base, dataset)
        for folder in folders.values()
    ]
    assert found == ["levels", None]


def test_the_steps_of_a_bfloat16_base_are_bitwise_equal_too(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd15"), tmp_path)
    base = load_base(config.model.base, dtype=torch.bfloat16)
    dataset, latent_cache = computed(config, base)
    assert latent_cache.identities["latents"]["dtype"] == "bfloat16"
    controlnet = build_controlnet(base.denoiser, config.model.hint_channels).to(torch.bfloat16)
    with torch.no_grad():
        for one, other in both(config, base, dataset, latent_cache, steps=5):
            found = [prediction_and_target(base, controlnet, to_device(batch, ALONE.device)) for batch in (one, other)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_latents_of_aspect_ratio_buckets_have_the_shapes_of_their_pictures(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (16, 64) if i % 2 else (48, 48))
    config = run_config(base_folder("sd15"), tmp_path, max_aspect_ratio=4.0, aspect_step=16)
    base = load_base(config.model.base)
    dataset, latent_cache = computed(config, base)
    controlnet = build_controlnet(base.denoiser, config.model.hint_channels)
    shapes = set()
    with torch.no_grad():
        for one, other in both(config, base, dataset, latent_cache, steps=8):
            shapes.add(other.encoded.mean.shape[2:])
            found = [prediction_and_target(base, controlnet, to_device(batch, ALONE.device)) for batch in (one, other)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(shapes) == 2


def test_undecodable_pictures_are_replaced_by_the_same_samples_with_a_latent_cache(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32), damaged=(2, 9, 10))
    config = run_config(base_folder("sd15"), tmp_path, max_bad_rate=1.0)
    base = load_base(config.model.base)
    dataset, latent_cache = computed(config, base)
    pairs = list(both(config, base, dataset, latent_cache, steps=10))
    assert all(one.keys == other.keys and np.array_equal(one.weights, other.weights) for one, other in pairs)
    assert not {"k002", "k009", "k010"} & {key for one, _ in pairs for key in one.keys}


def test_what_is_whole_is_not_computed_again(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd15"), tmp_path)
    base = load_base(config.model.base)
    _, latent_cache = computed(config, base)
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "latents").glob("*.tar")}
    assert len(files) == 2 * SHARDS and missing(latent_cache) == []
    gone = latent_cache.paths["latents"][2]
    gone.unlink()
    computed(config, base)
    again = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert {path for path in files if again[path][0] != files[path][0]} == {gone}
    assert again[gone][1] == files[gone][1]  # computed anew with the same bytes


def test_what_is_damaged_is_told_and_computed_again(base_folder, tmp_path, capsys):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd15"), tmp_path)
    base = load_base(config.model.base)
    _, latent_cache = computed(config, base)
    files = {path: path.read_bytes() for path in (tmp_path / "latents").glob("*.tar*")}
    cut, unindexed = latent_cache.paths["latents"][1], latent_cache.paths["text"][0]
    cut.write_bytes(files[cut][:1000])
    index_path(unindexed).write_bytes(b"")
    capsys.readouterr()
    computed(config, base)
    said = capsys.readouterr().err
    assert f"to be computed again: {cut} has 1000 bytes, its index says {len(files[cut])}\n" in said
    assert f"to be computed again: {index_path(unindexed)} is not a whole index\n" in said
    assert {path: path.read_bytes() for path in (tmp_path / "latents").glob("*.tar*")} == files


def test_two_ranks_write_the_bytes_that_one_writes(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd15"), tmp_path)
    base = load_base(config.model.base)
    _, latent_cache = computed(config, base)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "latents").glob("*.tar")}
    for path in (tmp_path / "latents").glob("*.tar*"):
        path.unlink()
    dataset = open_dataset(config.data.shards)
    jobs, buckets = lacking_kinds(latent_cache), run_buckets(config, dataset)
    for rank in range(2):
        compute(config, World(rank, 2, rank, torch.device("cpu")), base, dataset, buckets, latent_cache, jobs)
    assert {path.name: path.read_bytes() for path in (tmp_path / "latents").glob("*.tar")} == alone


def test_the_latent_cache_of_shards_on_a_web_server_is_that_of_the_same_shards_on_a_disk(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    local = run_config(base_folder("sd15"), tmp_path)
    base = load_base(local.model.base)
    _, latent_cache = computed(local, base)
    served = {f"/{path.name}": path.read_bytes() for path in (tmp_path / "shards").glob("*.tar")}
    manifest, there = (
        tmp_path / "remote.jsonl",
        dict(cache=str(tmp_path / "cache"), latent_cache=str(tmp_path / "others")),
    )
    with stores.web_server(served) as url:
        names = f"{url}/{{0..{SHARDS - 1}}}.tar"
        assert data_index.main([names, "--manifest", str(manifest), "--workers", "1"]) == 0
        remote = run_config(base_folder("sd15"), tmp_path, shards=str(manifest), **there)
        dataset, others = computed(remote, base)
        pairs = list(both(remote, base, dataset, others, steps=3))
    for kind, paths in latent_cache.paths.items():
        for path, other in zip(paths, others.paths[kind], strict=True):
            assert path.name == other.name and path.read_bytes() == other.read_bytes()
    assert all(one.keys == other.keys for one, other in pairs)


def test_the_bytes_that_are_announced_are_about_those_that_are_written(base_folder, tmp_path, capsys):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sdxl"), tmp_path)
    base = load_base(config.model.base)
    dataset, latent_cache = computed(config, base)
    jobs = {shard: ["latents", "text"] for shard in range(SHARDS)}
    announced = report(base, dataset, latent_cache, jobs)
    assert announced == 21 * sum(sample_bytes(base, latent_cache).values())
    assert "condition" not in capsys.readouterr().out
    latents = sum(path.stat().st_size for path in latent_cache.paths["latents"])
    assert 0 < latents - 21 * sample_bytes(base, latent_cache)["latents"] < SHARDS * 12_000  # tars end on 10 KiB
    report(base, dataset, latent_cache, jobs)
    said = capsys.readouterr().out
    assert "3 of 3 shards to compute: 21 samples" in said and "several captions" in said


def test_the_bytes_of_the_conditions_latents_are_announced_too(base_folder, tmp_path, capsys):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd3"), tmp_path, random_flip=True)
    base = load_base(config.model.base)
    dataset, latent_cache = computed(config, base)
    sizes = sample_bytes(base, latent_cache)
    capsys.readouterr()
    assert report(base, dataset, latent_cache, {0: ["condition.edges"]}) == 7 * sizes["condition.edges"]
    assert "condition.edges 1 of 3 shards to compute: 7 samples" in capsys.readouterr().out
    written = sum(path.stat().st_size for path in latent_cache.paths["condition.edges"])
    assert 0 < written - 21 * sizes["condition.edges"] < SHARDS * 12_000


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(ConfigError, match="the latent cache needs 1048576.000 GiB, and the disk of"):
        check_room(tmp_path / "not" / "there", 2**50)


def test_another_resolution_precision_or_encoder_is_another_identity(base_folder, tmp_path):
    write_shards(tmp_path / "shards", lambda i: (32, 32))
    config = run_config(base_folder("sd15"), tmp_path)
    base = load_base(config.model.base)
    computed(config, base)
    changed = latent_cache_identities(config, base, ((64, 64),))
    with pytest.raises(ValueError, match="shapes"):
        check_stated(tmp_path / "latents", changed)
    half = latent_cache_identities(config, load_base(config.model.base, dtype=torch.bfloat16), ((32, 32),))
    with pytest.raises(ValueError, match="dtype='float32' there, and here 'bfloat16'"):
        check_stated(tmp_path / "latents", half)
    with torch.no_grad():
        next(base.vae.parameters()).flatten()[0] += 1e-3
    with pytest.raises(ValueError, match="latents have vae="):
        check_stated(tmp_path / "latents", latent_cache_identities(config, base, ((32, 32),)))


def test_digests_do_not_depend_on_where_a_base_lies_nor_on_what_was_tokenized(load_tiny, base_folder, tmp_path):
    copied = shutil.copytree(base_folder("sd15"), tmp_path / "elsewhere")
    one, other = load_tiny("sd15"), load_base(copied)
    one.tokenizers[0](["a dog"], padding="max_length", truncation=True)
    assert module_digest(one.vae) == module_digest(other.vae)
    assert module_digest(one.text_encoders[0]) == module_digest(other.text_encoders[0])
    assert tokenizer_digest(one.tokenizers[0]) == tokenizer_digest(other.tokenizers[0])
    assert tokenizer_digest(one.tokenizers[0]) != module_digest(one.vae) != module_digest(one.text_encoders[0])


def test_a_latent_cache_among_the_shards_is_refused(tmp_path):
    dataset = open_dataset(write_shards(tmp_path / "shards", lambda i: (32, 32)))
    check_apart(tmp_path / "shards" / "latents", dataset)
    with pytest.raises(ConfigError, match="would be taken for shards: name a folder of its own"):
        check_apart(tmp_path / "shards", dataset)


def test_the_command_asks_for_the_folder_that_it_writes_to(capsys):
    config = Path(__file__).parents[3] / "launch" / "configs" / "quickstart.yaml"
    assert main(["data", "precompute", str(config), "--dry-run"]) == 2
    assert "data.latent_cache is not set: name the folder to write to" in capsys.readouterr().err


def test_random_crops_are_refused_where_a_latent_cache_is_named(base_folder, tmp_path):
    with pytest.raises(ConfigError, match="set data.random_crop=false, or leave data.latent_cache out"):
        run_config(base_folder("sd15"), tmp_path, random_crop=True)


def test_a_disk_without_locks_takes_a_latent_cache_and_one_that_fails_is_heard(tmp_path, monkeypatch):
    def disk_says(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    world = join()
    try:
        for number in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            disk_says(number)
            with only_writer(tmp_path, world, dry_run=False):
                pass
        disk_says(errno.EIO)
        with pytest.raises(OSError, match="Input/output error"), only_writer(tmp_path, world, dry_run=False):
            pass
    finally:
        leave()
