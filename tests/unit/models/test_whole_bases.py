"""Every tensor of a base comes from its files: what is missing, unknown or no number is refused by its name."""

import json
import shutil
from typing import Any

import pytest
import torch
from damaged_bases import apply, damage_tensor, damages, outcome
from diffusers import ControlNetModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import sharded, weights_of
from safetensors.torch import load_file, save_file

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.families import FAMILIES
from controlbooth.models.files.weight_files import safetensors_header
from controlbooth.models.noise.checks import NOISE_SCHEDULERS
from controlbooth.models.pretrained import DECODER_FILE, load_base, load_controlnet, save_controlnet
from controlbooth.models.unlocked_decoder import decoder_state, load_networks, save_decoder

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOLD = {
    "drop": "missing",
    "rename": r"missing.*is unknown",
    "extra": "the tensor another.weight is unknown",
    "transpose": r"has shape .* is needed",
    "shorten": r"has shape .* is needed",
    "integer": "has the dtype int32, where numbers with a fraction belong",
    "nan": "hold values that are no finite numbers",
    "infinite": "hold values that are no finite numbers",
}


@pytest.fixture
def copied(base_folder, tmp_path):
    return lambda family="sd15": shutil.copytree(base_folder(family), tmp_path / "base")


@pytest.mark.parametrize("damage", ["rename", "nan"])
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_does_not_fit_is_refused_by_name_in_every_network(part, damage, copied):
    base = copied("sdxl")
    damage_tensor(weights_of(base, part), damage, 7)
    with pytest.raises(ValueError, match=rf"{base / part}.*{TOLD[damage]}"):
        load_base(base)


@pytest.mark.parametrize("damage", [kind for kind in TOLD if kind not in ("nan", "infinite")])
def test_headers_alone_tell_what_does_not_fit(damage, copied):
    base = copied()
    damage_tensor(weights_of(base, "text_encoder"), damage, 7)
    with pytest.raises(ValueError, match=TOLD[damage]):
        load_base(base, device="meta")


def test_a_value_beyond_the_range_of_half_precision_is_told_where_it_is_used(copied):
    base = copied()
    damage_tensor(weights_of(base, "unet"), "huge", 7)
    load_base(base)  # a float32
    with pytest.raises(ValueError, match="beyond the range of float16. Use bf16 or fp32"):
        load_base(base, dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "index"), [("unet", True), ("vae", False), ("text_encoder_2", True)])
def test_a_network_in_several_files_is_read_whole_or_refused(part, index, copied, base_folder):
    base = copied("sdxl")
    files = sharded(base, part, index)
    expected, found = load_base(base_folder("sdxl")), load_base(base)
    for one, other in ((expected.denoiser, found.denoiser), (expected.text_encoders[1], found.text_encoders[1])):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{base / part} holds 1 of the 2 shards"):
        load_base(base, device="meta")


def test_files_of_two_downloads_are_not_mixed(copied):
    base = copied()
    files = sharded(base, "unet")
    shutil.copy(files[0], files[0].with_name("diffusion_pytorch_model-00001-of-00003.safetensors"))
    with pytest.raises(ValueError, match="shards of 2 and of 3 files"):
        load_base(base)
    files[0].with_name("diffusion_pytorch_model-00001-of-00003.safetensors").unlink()
    weights = load_file(files[1])
    save_file(weights | {sorted(load_file(files[0]))[0]: torch.zeros(1)}, files[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is in .*00001-of-00002.safetensors and in .*00002-of-00002"):
        load_base(base)


def test_names_that_libraries_gave_before_and_tensors_that_they_leave_out_are_no_faults(copied, base_folder):
    """Of 2022: a VAE's attention as query, key and value; text_model. before the text encoder's names, and its
    position ids, a buffer, with CLIP's other half beside them."""
    base = copied()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(weights_of(base, "vae"))
    for new, name in old.items():
        vae = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): tensor for key, tensor in vae.items()}
    assert any(".proj_attn." in key for key in vae)
    save_file(vae, weights_of(base, "vae"), metadata={"format": "pt"})
    text = load_file(weights_of(base, "text_encoder"))
    text = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in text.items()}
    text |= {"text_model.embeddings.position_ids": torch.arange(12)[None], "logit_scale": torch.tensor(1.0)}
    text |= {"vision_model.post_layernorm.weight": torch.zeros(3), "text_projection.weight": torch.zeros(2, 2)}
    save_file(text, weights_of(base, "text_encoder"), metadata={"format": "pt"})
    expected, found = load_base(base_folder("sd15")), load_base(base)
    for one, other in ((expected.vae, found.vae), (expected.text_encoders[0], found.text_encoders[0])):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_what_the_libraries_read_of_a_whole_folder(family, base_folder):
    import diffusers
    import transformers

    base, folder = load_base(base_folder(family)), base_folder(family)
    modules = (base.denoiser, base.vae, *base.text_encoders)
    for ours, part in zip(modules, (part.folder for part in base.family.parts), strict=True):
        kind: Any = getattr(diffusers if part in ("unet", "transformer", "vae") else transformers, type(ours).__name__)
        expected = kind.from_pretrained(folder / part, local_files_only=True)
        assert ours.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in expected.state_dict().items())
        assert dict(ours.named_buffers()).keys() == dict(expected.named_buffers()).keys()
        assert all(torch.equal(one, dict(ours.named_buffers())[name]) for name, one in expected.named_buffers())
        assert not ours.training


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_tokenizer_that_is_not_whole_is_refused(file, copied):
    base = copied()
    folder = base / "tokenizer"
    (folder / "tokenizer.json").unlink()
    words = [chr(number) for number in range(97, 123)]
    vocab = [*words, *(f"{word}</w>" for word in words), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    assert load_base(base).tokenizers[0].tokenize("cat") == ["cat</w>"]
    if file == "merges.txt":
        (folder / "merges.txt").write_text("#version: 0.2\nc a\n")  # its end was not downloaded
        with pytest.raises(ValueError, match="1 tokens of the vocabulary, such as 'cat</w>', come out of no merge"):
            load_base(base)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json or vocab.json with merges.txt"):
        load_base(base)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_folder_is_refused_by_name_or_is_no_other_base_in_silence(data, base_folder, load_tiny, tmp_path):
    whole, base = base_folder("sd15"), tmp_path / "base"
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(whole, base)
    apply(base, data.draw(damages(whole)))
    assert outcome(load_tiny("sd15"), base) is None


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("vae", dict(scaling_factor=None), "the VAE's scaling_factor is None, and a number above 0 belongs there"),
        ("vae", dict(scaling_factor=-0.1), "the VAE's scaling_factor is -0.1"),
        ("vae", dict(shift_factor="a"), "the VAE's shift_factor is 'a'"),
        ("unet", dict(sample_size=None), "the U-Net's sample_size is None"),
        ("unet", dict(sample_size=[4, 4, 4]), "the U-Net's sample_size is"),
        ("unet", dict(in_channels=[4]), r"the U-Net's in_channels is \[4\]"),
        ("unet", dict(block_out_channels=None), "describes no UNet2DConditionModel that can be made"),
        ("text_encoder", dict(hidden_size="wide"), "describes no CLIPTextModel that can be made"),
    ],
)
def test_a_configuration_without_a_number_where_one_belongs_is_refused(file, change, told, copied):
    config = copied() / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        load_base(config.parents[1], device="meta")


def test_a_link_to_nothing_is_named(copied):
    """As in a hub's cache of which a part was deleted."""
    file = weights_of(copied(), "vae")
    file.unlink()
    file.symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match=f"{file} is a link to nothing, which is not there"):
        load_base(file.parents[1])


# --- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "a FlowMatch.*Scheduler, which says flow matching"),
        (dict(_class_name="FlowMatchLCMScheduler"), "which says flow matching"),
        (dict(_class_name="EDMEulerScheduler"), "which says EDM's noise levels"),
        (dict(_class_name="CosineDPMSolverMultistepScheduler"), "the scheduler is a CosineDPMSolverMultistepScheduler"),
        (dict(_class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas is True"),
        (dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"), "timestep_type is 'continuous'"),
        (dict(prediction_type="flow_prediction"), "'flow_prediction' is neither epsilon nor v_prediction"),
        (dict(prediction_type=None), "prediction_type None is neither"),
        (dict(beta_start="a"), "beta_start is 'a'"),
        (dict(beta_end=12.0), "beta_end is 12.0"),
        (dict(num_train_timesteps=0), "num_train_timesteps is 0"),
        (dict(beta_schedule="cosine"), "beta_schedule is 'cosine', which is none of linear"),
        (dict(trained_betas=[0.1, 0.2]), "trained_betas has 2 values for num_train_timesteps=1000"),
    ],
)
def test_a_scheduler_that_such_a_unet_cannot_have_been_trained_with_is_refused(change, told, copied):
    file = copied() / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{file}.*{told}"):
        load_base(file.parents[1], device="meta")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULERS))
def test_every_scheduler_of_the_same_noise_is_read(name, copied):
    """As diffusers writes it by default, with Stable Diffusion's betas."""
    import diffusers

    base = copied()
    try:
        made = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    except (ImportError, AttributeError) as error:  # DPMSolverSDE needs torchsde
        pytest.skip(f"{name} is not in this diffusers, or needs a package that is not here: {error}")
    made.save_pretrained(base / "scheduler")
    loaded = load_base(base, device="meta")
    assert loaded.prediction_type == "epsilon" and loaded.process.scheduler.config["beta_end"] == 0.012
    assert loaded.identity["scheduler"]["class"] == name


# --- ControlNets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def controlnet_folder(load_tiny, tmp_path):
    base = load_tiny("sd15")
    save_controlnet(build_controlnet(base.denoiser, (4, 4, 8, 8)), tmp_path / "net")
    return base, tmp_path / "net"


@pytest.mark.parametrize("damage", TOLD)
def test_a_tensor_of_a_controlnet_that_does_not_fit_is_refused_by_name(damage, controlnet_folder):
    base, folder = controlnet_folder
    damage_tensor(folder / "diffusion_pytorch_model.safetensors", damage, 40)
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match=rf"{path}.*{TOLD[damage]}"):
            load_controlnet(path, base.denoiser)


def test_a_controlnet_for_other_conditions_is_refused_with_its_number(load_tiny, tmp_path):
    base = load_tiny("sd15")
    gray = ControlNetModel.from_unet(
        base.denoiser, conditioning_channels=1, conditioning_embedding_out_channels=(4, 4, 8, 8)
    )
    save_controlnet(gray, tmp_path / "net")
    for path in (tmp_path / "net", tmp_path / "net" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match=f"{path}: its conditioning_channels is 1, and conditions here are RGB"):
            load_controlnet(path, base.denoiser)


@pytest.mark.parametrize("damage", ["drop", "shorten", "nan", "integer"])
def test_a_decoder_that_has_learned_is_read_whole_or_refused(damage, controlnet_folder):
    base, folder = controlnet_folder
    save_decoder(decoder_state(base.denoiser), folder)
    assert load_networks(folder, base)[0] is not base
    damage_tensor(folder / DECODER_FILE, damage, 3)
    with pytest.raises(ValueError, match=str(folder)):
        load_networks(folder, base)


# --- files ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200), whole=st.booleans())
def test_bytes_that_are_no_weights_are_told_with_the_files_name(data, whole, tmp_path_factory):
    """Also behind a length that is right, so that the bytes are read as a header."""
    file = tmp_path_factory.mktemp("files") / "model.safetensors"
    file.write_bytes((len(data).to_bytes(8, "little") if whole else b"") + data)
    try:
        header = safetensors_header(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert header == {}


ENTRIES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(-1, 9), max_size=3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(dtype=ENTRIES, shape=ENTRIES, offsets=ENTRIES)
def test_a_header_whose_entry_is_none_is_told_with_the_files_name(dtype, shape, offsets, tmp_path_factory):
    file = tmp_path_factory.mktemp("files") / "model.safetensors"
    text = json.dumps({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=str(file)):
        safetensors_header(file)
