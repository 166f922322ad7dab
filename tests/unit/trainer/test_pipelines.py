"""The pipeline of a subject that was trained in all layers loads in diffusers, whatever files its base has."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.pipeline import write_pipeline


def halved(base):
    """Every network as its fp16 variant alone, and a text encoder in two files, as published folders have them."""
    for file in sorted(base.rglob("*.safetensors")):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        file.unlink()
        if file.parent.name != "text_encoder":
            save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
            continue
        for number in (0, 1):
            own = {name: tensor for row, (name, tensor) in enumerate(half.items()) if row % 2 == number}
            shard = f"model.fp16-0000{number + 1}-of-00002.safetensors"
            save_file(own, file.with_name(shard), metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pipeline"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_a_pipeline_of_a_half_precision_base_loads_without_a_variant(family, pipeline, base_folder, tmp_path):
    base = shutil.copytree(base_folder(family), tmp_path / "base")
    halved(base)
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    (base / "README.md").write_text("of the base")
    trained = {f"unet.{name}": tensor + 1.0 for name, tensor in load_base(base).denoiser.state_dict().items()}
    config = SubjectRunConfig(name="x", model={"base": str(base)}, method="full")
    write_pipeline(config, trained, tmp_path / "pipeline")
    optional = {} if family == "sdxl" else dict(safety_checker=None, feature_extractor=None)
    loaded = pipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True, **optional)
    networks = [loaded.unet, loaded.vae, loaded.text_encoder, *([loaded.text_encoder_2] if family == "sdxl" else [])]
    assert {network.dtype for network in networks} == {torch.float32}
    assert torch.equal(loaded.unet.conv_in.weight, trained["unet.conv_in.weight"])
    expected = load_base(base)
    for network, own in zip(networks[1:], (expected.vae, *expected.text_encoders), strict=True):
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert not (tmp_path / "pipeline" / "README.md").exists()
    again = load_base(tmp_path / "pipeline")
    assert {part: again.identity[part] for part in ("scheduler", "tokenizer")} == {
        part: expected.identity[part] for part in ("scheduler", "tokenizer")
    }


def test_other_networks_of_a_folder_get_plain_names_too(base_folder, tmp_path):
    """Such as a safety checker, of which nothing is read here."""
    base = shutil.copytree(base_folder("sd15"), tmp_path / "base")
    other = base / "safety_checker"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "clip", "torch_dtype": "float16"}))
    weights = {"a.weight": torch.ones(2).half(), "position_ids": torch.arange(3)}
    save_file(weights, other / "model.fp16.safetensors", metadata={"format": "pt"})
    (other / "kept.txt").write_text("as it is")
    config = SubjectRunConfig(name="x", model={"base": str(base)}, method="full")
    write_pipeline(config, {}, tmp_path / "pipeline")
    made = tmp_path / "pipeline" / "safety_checker"
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "kept.txt", "model.safetensors"]
    found = load_file(made / "model.safetensors")
    assert found["a.weight"].dtype == torch.float32 and found["position_ids"].dtype == torch.int64
    assert json.loads((made / "config.json").read_text()) == {"model_type": "clip"}
