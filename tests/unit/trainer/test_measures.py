"""Figures of subjects: computed by hand, on encoders whose weights are made here, and on real pictures."""

import json
import re
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.scenes.render import CLASSES, COLOURS, Scene, SceneObject, render, scene
from controlbooth.launch.commands import dreambooth_measure
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.measuring import fidelity, measure, protocol
from controlbooth.trainer.evaluation import encoders

CPU = torch.device("cpu")


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(np.array(rows), dtype=torch.float32), dim=1)


def task(noun="star", prompt="a olis star", name="one"):
    return Task(name, (), noun, "olis", prompt, f"a {noun}", 10, 1e-3, 4)


def pictures(count, side=64, seed=3):
    return np.stack([render(scene(seed, n), side).image for n in range(count)])


def test_fidelity_is_the_mean_over_all_pairs_of_drawn_and_real():
    drawn, real = unit([1, 0], [0, 1]), unit([1, 0], [1, 0], [3, 4])
    assert fidelity.similarity(drawn, real) == pytest.approx((1 + 1 + 0.6 + 0 + 0 + 0.8) / 6)


def test_prompt_fidelity_pairs_each_picture_with_its_own_prompt():
    images, texts = unit([1, 0], [0, 1]), unit([3, 4], [4, 3])
    assert fidelity.prompt_similarity(images, texts) == pytest.approx((0.6 + 0.6) / 2)
    with pytest.raises(ValueError, match="row by row"):
        fidelity.prompt_similarity(images, texts[:1])


def test_diversity_leaves_out_what_a_picture_is_to_itself_and_averages_over_prompts():
    first = torch.tensor([[9.0, 0.2, 0.4], [0.2, 9.0, 0.6], [0.4, 0.6, 9.0]])
    second = torch.tensor([[9.0, 0.1], [0.1, 9.0]])
    assert fidelity.diversity([first, second]) == pytest.approx((0.4 + 0.1) / 2)
    with pytest.raises(ValueError, match="at least two"):
        fidelity.diversity([first[:1, :1]])


def test_separation_of_two_subjects_by_hand():
    rows = unit([1, 0], [0.6, 0.8], [0, 1], [0, 1])
    found = fidelity.separation(rows, ["a", "a", "b", "b"])
    assert found["within"] == pytest.approx((0.6 + 1.0) / 2)
    assert found["between"] == pytest.approx((0 + 0 + 0.8 + 0.8) / 4)
    assert found["nearest_neighbour"] == 0.75  # the second picture is nearer to those of b


def test_separation_refuses_one_subject_and_a_subject_of_one_picture():
    rows = unit([1, 0], [0, 1], [1, 1])
    with pytest.raises(ValueError, match=r"one subject \(a\)"):
        fidelity.separation(rows, ["a"] * 3)
    with pytest.raises(ValueError, match="b has one picture"):
        fidelity.separation(rows, ["a", "a", "b"])


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 6))
def test_no_figure_depends_on_the_order_of_pictures(seed, drawn_count, real_count):
    generator = np.random.default_rng(seed)
    drawn, real = (unit(*generator.normal(size=(n, 5))) for n in (drawn_count, real_count))
    order = generator.permutation(drawn_count)
    assert fidelity.similarity(drawn[order], real.flip(0)) == pytest.approx(fidelity.similarity(drawn, real), abs=1e-6)
    square = drawn @ drawn.T
    assert fidelity.diversity([square[order][:, order]]) == pytest.approx(fidelity.diversity([square]), abs=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoders of random weights in the layouts of facebook/dino-vits16 and openai/clip-vit-base-patch32."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessorPil,
        ViTModel,
    )

    root = tmp_path_factory.mktemp("encoders")
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    vit = ViTConfig(**sizes, image_size=32, patch_size=8)
    for name, model in (("dino", ViTModel(vit)), ("classifier", ViTForImageClassification(vit))):
        model.save_pretrained(root / name)
        ViTImageProcessorPil(size=dict(height=32, width=32)).save_pretrained(root / name)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    words = CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=12)
    text = CLIPTextConfig(
        **sizes, vocab_size=len(words), max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(root / "clip")
    crop = dict(height=32, width=32)
    CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=crop).save_pretrained(root / "clip")
    words.save_pretrained(root / "clip")
    return root


def test_dino_is_the_class_token_of_transformers_own_model(folders):
    from transformers import ViTImageProcessorPil, ViTModel

    shown = pictures(3)
    model = ViTModel.from_pretrained(folders / "dino").eval()
    pixels = ViTImageProcessorPil.from_pretrained(folders / "dino")(list(shown), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = model(pixel_values=pixels).last_hidden_state[:, 0]
    encoder = encoders.dino_encoder(folders / "dino", CPU)
    assert encoder.title == "DINO" and "width 24, patch 8, 2 layers" in encoder.what
    torch.testing.assert_close(encoder.images(shown), token / token.norm(dim=1, keepdim=True))


def test_clip_agrees_with_transformers_own_similarity(folders):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    shown, prompts = pictures(2), ["a star", "a box in the snow"]
    model = CLIPModel.from_pretrained(folders / "clip").eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folders / "clip")(list(shown), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folders / "clip")(
        prompts, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    encoder = encoders.clip_encoder(folders / "clip", CPU)
    torch.testing.assert_close(encoder.images(shown), out.image_embeds)
    torch.testing.assert_close(encoder.texts(prompts), out.text_embeds)


@pytest.mark.slow
def test_a_picture_has_one_embedding_in_every_batch_and_order(folders):
    shown = pictures(19)  # more than one batch
    for encoder in (
        encoders.dino_encoder(folders / "dino", CPU),
        encoders.clip_encoder(folders / "clip", CPU),
        encoders.substitute_encoder(encoders.load_substitute(CPU), CPU),
    ):
        together = encoder.images(shown)
        torch.testing.assert_close(encoder.images(shown[::-1].copy()).flip(0), together, atol=2e-6, rtol=0)
        torch.testing.assert_close(encoder.images(shown[7:8])[0], together[7], atol=2e-6, rtol=0)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(19))


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("dino", "clip", "a model of type 'clip', and dino is one of vit, dinov2"),
        ("clip", "dino", "a model of type 'vit', and clip is one of clip"),
        ("dino", "classifier", "a ViTForImageClassification, a classifier"),
        ("dino", "nothing", "config.json cannot be read .* Give a folder that transformers saved"),
    ],
)
def test_a_folder_of_another_kind_is_refused(folders, name, folder, message):
    with pytest.raises(ConfigError, match=message):
        encoders.open_encoders({name: folders / folder}, CPU)


def test_weights_that_are_missing_are_not_made_up(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folders / "dino", tmp_path / "dino")
    weights = load_file(broken / "model.safetensors")
    gone = next(name for name in weights if "layer.1" in name or "layers.1" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights"):
        encoders.dino_encoder(broken, CPU)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # as where it is not installed
    with pytest.raises(
        ConfigError, match="efficientnet_lite_pytorch is missing.*pip install efficientnet-lite-pytorch"
    ):
        encoders.open_encoders({}, CPU)


def test_the_substitute_is_never_called_dino_or_lpips():
    opened = encoders.open_encoders({}, CPU)
    assert opened.clip is None
    assert "dino" not in (opened.subject.key + opened.subject.title).lower()
    assert "in place of DINO" in opened.subject.what and "is not LPIPS" in opened.div_what
    assert "lpips" not in (opened.div_key + opened.div_title).lower()


def test_feature_distance_is_zero_to_itself_symmetric_and_by_hand_on_one_map():
    network = encoders.load_substitute(CPU)
    shown = pictures(3)
    distances = encoders.feature_distances(network, shown, CPU)
    assert distances.diagonal().abs().max() == 0
    torch.testing.assert_close(distances, distances.T)
    assert (distances[~torch.eye(3, dtype=torch.bool)] > 0.01).all() and distances.max() <= 4
    by_hand = []
    with torch.no_grad():
        for one in encoders.feature_maps(network, encoders.to_substitute(shown)):
            a, b = (one[n] / one[n].norm(dim=0) for n in (0, 1))
            by_hand.append(float((a - b).square().sum(dim=0).mean()))
    assert len(by_hand) == 5 and float(distances[0, 1]) == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_the_networks_maps_end_in_what_its_own_package_computes():
    network = encoders.load_substitute(CPU)
    pixels = encoders.to_substitute(pictures(2))
    with torch.no_grad():
        torch.testing.assert_close(encoders.feature_maps(network, pixels)[-1], network.extract_features(pixels))


def embedded_subjects(count=8, shots=4):
    """Photographs of embedded subjects: one object each, at other places and angles on other backgrounds."""
    rng = np.random.default_rng(0)
    shown, names = [], []
    for number in range(count):
        kind, colour = list(CLASSES)[number], list(COLOURS)[(5 * number) % 12]
        for shot in range(shots):
            x, y, angle = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65), rng.uniform(-20, 20)
            behind = scene(50 + number, shot)
            thing = SceneObject(kind, colour, "large", x, y, 0.3, angle, (0, 0, 0))
            shown.append(render(Scene((thing,), behind.background, behind.horizon, behind.slope), 64).image)
            names.append(f"{kind}-{number}")
    return np.stack(shown), names


def test_the_substitute_tells_embedded_subjects_apart():
    shown, names = embedded_subjects()
    encoder = encoders.substitute_encoder(encoders.load_substitute(CPU), CPU)
    found = fidelity.separation(encoder.images(shown), names)
    assert found["within"] > found["between"] + 0.2
    assert found["nearest_neighbour"] > 0.8  # 1/8 by chance


def test_the_protocol_has_25_prompts_for_objects_live_subjects_and_the_embedded_world():
    for noun, embedded, example in (
        ("backpack", False, "a {thing} floating in an ocean of milk"),
        ("stuffed animal", False, "a {thing} on top of a mirror"),
        ("dog", False, "a {thing} wearing a santa hat"),
        ("star", True, "a {thing} on a blue and white background"),
    ):
        prompts = protocol.prompts_for(noun, embedded)
        assert len(prompts) == len(set(prompts)) == 25
        assert example in prompts or embedded, prompts


def test_fewer_prompts_are_spread_over_the_list_and_are_the_same_pictures(tmp_path):
    assert protocol.chosen_prompts(25, 25) == list(range(25))
    assert protocol.chosen_prompts(3, 25) == [0, 12, 24]
    with pytest.raises(ConfigError, match="--prompts is 26; the protocol has 1 to 25"):
        protocol.chosen_prompts(26, 25)
    few, all_of_them = (set(protocol.drawings(task(), tmp_path, False, n, m)) for n, m in ((3, 2), (25, 4)))
    assert few < all_of_them and len(all_of_them) == 25 * 4 + 25
    assert len({row.seed for row in all_of_them}) == len({row.path for row in all_of_them}) == 125


def test_one_picture_of_a_prompt_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--images is 1.*at least 2"):
        protocol.drawings(task(), tmp_path, False, 3, 1)


def test_prompts_name_the_subject_as_it_was_trained_and_describe_it_without_the_identifier(tmp_path):
    first = protocol.drawings(task(), tmp_path, False, 1, 2)[0]
    assert (first.prompt, first.described) == ("a olis star in the jungle", "a star in the jungle")
    nameless = protocol.drawings(task(prompt="a olis"), tmp_path, False, 1, 2)
    assert (nameless[0].prompt, nameless[0].described) == ("a olis in the jungle", "a star in the jungle")
    assert nameless[-1].prompt == "a star"


def test_the_judge_counts_backgrounds_and_classes_in_real_scenes(tmp_path):
    plan = protocol.drawings(task(), tmp_path, True, 6, 2)
    shown = []
    for row in plan:
        thing = SceneObject("star", "red", "large", 0.5, 0.5, 0.28, 0.0, (0, 0, 0))
        colours = protocol.asked_background(row.described) if row.group >= 0 else ("gray",)
        shown.append(render(Scene((thing,), colours, 0.6, 0.0), 64).image)
    seen = measure.read(measure.load_judge(), np.stack(shown))
    assert measure.judged(seen, plan, "star")["judge_class"] > 0.8
    assert measure.judged(seen, plan, "box")["judge_class"] < 0.2
    assert measure.judged(seen, plan, "star")["judge_background"] > 0.6
    assert measure.judged(seen[::-1], plan, "star")["judge_background"] < 0.4


def test_figures_of_a_subject_by_hand(tmp_path):
    """Encoders that read the mean colour: red is (1, 0, 0), and so on."""

    def colours(shown):
        return torch.nn.functional.normalize(torch.from_numpy(shown.mean(axis=(1, 2))).float(), dim=1)

    def plain(*rows):
        return np.stack([np.full((8, 8, 3), row, np.uint8) for row in rows])

    red, green = (200, 0, 0), (0, 200, 0)
    opened = encoders.Encoders(
        subject=encoders.Encoder("colour", "Colour", "mean colour", colours),
        clip=encoders.Encoder("clip", "CLIP", "same", colours, lambda texts: unit([1, 0, 0]).repeat(len(texts), 1)),
        div_key="div", div_title="DIV", div_what="", distances=lambda shown: 1 - colours(shown) @ colours(shown).T,
    )  # fmt: skip
    plan = protocol.drawings(task(), tmp_path, False, 2, 2)
    drawn = plain(red, red, red, green, green, red)  # two of each of two prompts, two of the class
    figures = measure.figures_of(opened, plain(red, red, red), drawn, plan)
    expected = dict(colour=0.75, pres_colour=0.5, div=0.5, real_colour=1.0, clip_i=0.75, clip_t=0.75)
    assert figures == pytest.approx(expected, abs=1e-6)


def test_real_pictures_in_folders_are_measured_from_the_command_line(tmp_path, capsys):
    from PIL import Image

    shown, names = embedded_subjects(count=3, shots=3)
    for number, (picture, name) in enumerate(zip(shown, names, strict=True)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name / f"{number}.png")
    assert dreambooth_measure.main(["--real", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "9 real pictures of 3 subjects" in printed and "in place of DINO" in printed
    within, between, nearest = map(float, re.search(r"EffNet-I +(\S+) +(\S+) +(\S+)", printed).groups())
    assert within > between and nearest > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either the folder of a run, or --real"),
        (["run", "--real", "x"], "give either the folder of a run, or --real"),
        (["--real", "nowhere"], "nowhere is no folder"),
        (["nowhere"], "holds no subjects.json.*Start it with `controlbooth dreambooth run`"),
        (["run", "--encoder", "dyno=x"], "'dyno=x' is not understood; write dino=FOLDER or clip=FOLDER"),
    ],
)
def test_a_command_that_cannot_work_says_what_to_do(arguments, message):
    with pytest.raises(ConfigError, match=message):
        dreambooth_measure.main(arguments)


def test_a_run_without_a_finished_subject_says_so(tmp_path):
    (tmp_path / "subjects.json").write_text(
        json.dumps([dict(vars(task()), images=[str(Path("a.png"))])]),
    )
    (tmp_path / "config.yaml").write_text("name: pets\nmodel: {base: miniature}\n")
    with pytest.raises(ConfigError, match="none of the 1 subjects .* is finished"):
        dreambooth_measure.main([str(tmp_path)])


NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """A run of three finished subjects with LoRAs of random numbers, and one that has failed."""
    import yaml
    from PIL import Image

    from controlbooth.models.lora import ATTENTION, attach_adapters, reset_subject, subject_weights
    from controlbooth.models.pretrained import load_base
    from controlbooth.trainer.config.subjects import load_run
    from controlbooth.trainer.dreambooth.manifest import record_texts
    from controlbooth.trainer.dreambooth.stack import LORA_FILE, save_lora
    from controlbooth.trainer.dreambooth.status import write_status
    from controlbooth.trainer.run.attempt import Attempt

    root = tmp_path_factory.mktemp("runs")
    tree = dict(
        name="pets", output=str(root), model=dict(base=str(base_folder("sd15"))), precision="fp32", resolution=32,
        subjects_per_batch=2, prior=dict(sampling_steps=2, guidance_scale=3.0), adapter=dict(rank=4),
    )  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    adapters = attach_adapters(load_base(base_folder("sd15")).denoiser, ATTENTION, 1, 4)
    attempt = Attempt(root / "pets", 1, "id")
    attempt.folder.mkdir(parents=True)
    tasks = []
    for number, name in enumerate((*NAMES, "broken")):
        files = tuple(root / f"{name}-{shot}.png" for shot in range(2))
        for file, picture in zip(files, pictures(2, 32, seed=number), strict=True):
            Image.fromarray(picture).save(file)
        rank = 2 + number % 2
        tasks.append(Task(name, files, "dog", "olis", "a olis dog", "a dog", 10, 1e-3, rank))
        if name == "broken":
            write_status(attempt, root / "pets", name, state="failed", error="for this test")
            continue
        reset_subject(adapters, 0, rank, seed=number)
        for adapter in adapters.values():
            adapter.up.data[0, :, :rank] = torch.randn(adapter.up.shape[1], rank) * 2
        weights = {f"unet.{layer}": tensor for layer, tensor in subject_weights(adapters, 0, rank).items()}
        save_lora(attempt, weights, root / "pets" / "subjects" / name / LORA_FILE)
        write_status(attempt, root / "pets", name, state="finished", step=10)
    for name, text in record_texts(load_run(root / "run.yaml"), tasks).items():
        (root / "pets" / name).write_text(text)
    return root / "pets"


@pytest.fixture(scope="module")
def measured(trained, folders):
    arguments = ["--prompts", "2", "--images", "2", "--encoder", f"clip={folders / 'clip'}"]
    assert dreambooth_measure.main([str(trained), *arguments, "--encoder", f"dino={folders / 'dino'}"]) == 0
    return trained


def drawn_files(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.glob("subjects/*/pictures/*.png"))}


@pytest.mark.slow
def test_every_finished_subject_has_its_figures_its_grid_and_its_pictures(measured):
    result = json.loads((measured / "measures.json").read_text())
    assert tuple(result["subjects"]) == NAMES
    names = {"dino", "pres_dino", "real_dino", "clip_i", "clip_t", "feature_distance_efficientnet_lite0"}
    for name, figures in result["subjects"].items():
        assert figures.keys() == names and all(np.isfinite(list(figures.values())))
        assert (measured / "subjects" / name / "samples.png").stat().st_size > 1000
    assert result["mean"]["clip_t"] == pytest.approx(np.mean([row["clip_t"] for row in result["subjects"].values()]))
    assert set(result["encoders"]) == {"DINO", "CLIP", "DIV by EffNet"}
    assert len(drawn_files(measured)) == 3 * (2 * 2 + 2)


@pytest.mark.slow
def test_a_picture_of_a_stack_is_the_one_that_its_lora_draws_alone(measured, base_folder):
    from PIL import Image

    from controlbooth.models.files.loading import read_tensors
    from controlbooth.models.lora import ATTENTION, attach_adapters, load_subject
    from controlbooth.models.pretrained import load_base
    from controlbooth.models.sampling import sample
    from controlbooth.trainer.dreambooth.manifest import read_record
    from controlbooth.trainer.dreambooth.stack import LORA_FILE

    base = load_base(base_folder("sd15"))
    adapters = attach_adapters(base.denoiser, ATTENTION, 1, 4)
    _, tasks = read_record(measured)
    others = []
    for one in tasks[:3]:
        saved = read_tensors([measured / "subjects" / one.name / LORA_FILE])
        load_subject(adapters, 0, {name.removeprefix("unet."): tensor for name, tensor in saved.items()})
        row = protocol.drawings(one, measured / "subjects" / one.name / "pictures", False, 2, 2)[0]
        alone = sample(base, [row.prompt], seeds=[row.seed], steps=2, guidance_scale=3.0)[0].numpy()
        stacked = np.asarray(Image.open(row.path))
        assert np.abs(alone.astype(int) - stacked).max() <= 1
        bare = (
            alone.astype(int)
            - sample(load_base(base_folder("sd15")), [row.prompt], seeds=[row.seed], steps=2, guidance_scale=3.0)[
                0
            ].numpy()
        )
        others.append(np.abs(bare).max())
    assert min(others) > 5  # each LoRA changes the picture


@pytest.mark.slow
def test_pictures_are_found_again_and_only_what_is_missing_is_drawn(measured, capsys):
    before = drawn_files(measured)
    lost = sorted(before)[1]
    times = {path: (measured / path).stat().st_mtime_ns for path in before}
    (measured / lost).unlink()
    assert dreambooth_measure.main([str(measured), "--prompts", "2", "--images", "2"]) == 0
    assert drawn_files(measured) == before
    assert [path for path in before if (measured / path).stat().st_mtime_ns != times[path]] == [lost]
    assert "EffNet-I: features of an ImageNet" in capsys.readouterr().out


@pytest.mark.slow
def test_pictures_of_other_weights_are_drawn_anew(measured):
    import shutil

    before = drawn_files(measured)
    lora = measured / "subjects" / "first" / "pytorch_lora_weights.safetensors"
    kept = lora.read_bytes()
    shutil.copy(measured / "subjects" / "second" / lora.name, lora)
    assert dreambooth_measure.main([str(measured), "--prompts", "2", "--images", "2"]) == 0
    changed = {path.parts[1] for path, content in drawn_files(measured).items() if before[path] != content}
    assert changed == {"first"}
    lora.write_bytes(kept)


def test_pictures_are_drawn_anew_where_any_network_has_changed_and_a_network_may_be_in_several_files(
    base_folder, tmp_path
):
    from controlbooth.models.pretrained import load_base
    from controlbooth.trainer.config.subjects import SubjectRunConfig

    config = SubjectRunConfig.model_validate(dict(name="full", method="full", model=dict(base="miniature")))
    base = load_base(base_folder("sd15"))
    pipeline, drawn = (tmp_path / "subjects" / "one" / name for name in ("pipeline", "pictures"))
    base.denoiser.save_pretrained(pipeline / "unet", max_shard_size="20KB")
    base.text_encoders[0].save_pretrained(pipeline / "text_encoder")
    assert len(list((pipeline / "unet").glob("*.safetensors"))) > 1
    parameters = list(base.denoiser.parameters())
    for network, parameter, part in (
        (base.denoiser, parameters[0], "unet"),
        (base.denoiser, parameters[-1], "unet"),
        (base.text_encoders[0], next(base.text_encoders[0].parameters()), "text_encoder"),
    ):
        measure.forget_others(tmp_path, config, base, task())
        (drawn / "a.png").touch()
        measure.forget_others(tmp_path, config, base, task())
        assert (drawn / "a.png").exists()
        parameter.data += 1
        network.save_pretrained(pipeline / part, **(dict(max_shard_size="20KB") if part == "unet" else {}))
        measure.forget_others(tmp_path, config, base, task())
        assert not (drawn / "a.png").exists(), part


@pytest.mark.slow
def test_mlflow_has_a_run_with_a_child_for_each_subject(measured):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{measured.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("controlbooth")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"pets", *NAMES}
    result = json.loads((measured / "measures.json").read_text())
    for name in NAMES:
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["pets"].info.run_id
        assert runs[name].info.status == "FINISHED"
        key = next(iter(result["subjects"][name]))
        assert runs[name].data.metrics[f"evaluation/{key}"] == pytest.approx(result["subjects"][name][key])
        assert [file.path for file in client.list_artifacts(runs[name].info.run_id)] == ["samples.png"]
    assert runs["pets"].data.metrics[f"evaluation/{key}"] == pytest.approx(result["mean"][key])


@pytest.mark.slow
def test_two_ranks_share_the_subjects_and_print_the_same_figures(measured):
    import shutil

    assert dreambooth_measure.main([str(measured), "--prompts", "2", "--images", "2"]) == 0
    before, pictures_before = json.loads((measured / "measures.json").read_text()), drawn_files(measured)
    for path in measured.glob("subjects/*/pictures"):
        shutil.rmtree(path)
    words = ["-m", "controlbooth.launch.cli", "dreambooth", "measure", measured, "--prompts", "2", "--images", "2"]
    done = forked.run(2, words, timeout=600, **forked.BEFORE_IMPORTS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("3 subjects, 2 prompts x 2 images") == 1
    after = json.loads((measured / "measures.json").read_text())
    assert drawn_files(measured).keys() == pictures_before.keys()
    for name in NAMES:
        assert after["subjects"][name] == pytest.approx(before["subjects"][name], abs=5e-3)
