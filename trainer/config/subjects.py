"""The subjects of a DreamBooth run: a manifest of many, checked one by one, and the fields that they share.

Free of torch, as `config` is. What is wrong with one subject is that subject's message; the others are trained.
"""

from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from controlbooth.data.arguments import SEEDS
from controlbooth.data.errors import UserError
from controlbooth.trainer.config.file_kinds import SUBJECTS
from controlbooth.trainer.config.loading import explain_errors, read_tree
from controlbooth.trainer.config.run import (
    EngineConfig,
    FlowConfig,
    FrozenConfig,
    Name,
    OptimizerName,
    Recomputed,
    TrackingConfig,
    activation_problems,
    optimizer_problem,
    rate_problem,
)
from controlbooth.trainer.config.section import ConfigError, Section


class BaseConfig(Section):
    base: str
    """A diffusers folder, a single .safetensors file, or `miniature` for the model shipped with controlbooth."""
    family: Literal["auto", "sd15", "sd21", "sdxl", "miniature", "sd3", "flux", "miniature-dit"] = "auto"
    """What the base is; `auto` reads it from the base's own configuration."""
    t5: bool = True
    """Whether SD3's third text encoder, T5, is used; without it zeros stand in its place, as in the pipelines."""
    text_tokens: int | None = Field(default=None, ge=1, le=512)
    """To which T5's prompts are filled up or cut. Default: as in the pipelines, 256 for SD3 and 512 for FLUX.1. What
    fills up is read as words are, so inference wants the same number."""
    attention: Literal["auto", "xformers", "flash", "cudnn", "efficient", "math", "plain"] = "auto"
    """Memory-efficient attention: `xformers` needs CUDA and the package; the others are PyTorch's kernels, of which
    `cudnn` and `efficient` need CUDA; `plain` is matrix products alone. `auto` takes the fastest."""
    gradient_checkpointing: Recomputed = False
    """Recompute activations in the backward pass: less memory, about a third more time. A number between 0 and 1 does
    it for that share of the U-Net's blocks, those on the largest grids first."""
    frozen: FrozenConfig = FrozenConfig()
    """Of `lora`: how the base is held in memory; `shards` is for ControlNets. Adapters are put into the base as it is
    held, so they learn around what its precision rounds."""


class AdapterConfig(Section):
    """LoRA (arXiv 2106.09685), with alpha = rank, as in diffusers' example."""

    rank: int = Field(default=4, gt=0)
    layers: Literal["attention", "attention+convolutions", "attention+mlp"] = "attention"
    """The projections of every attention, in a transformer those of picture and text. Besides, of a U-Net its
    convolutions, or of a transformer (SD3, FLUX.1) the layers that each block has behind its attention."""


class PriorConfig(Section):
    """Prior preservation (arXiv 2208.12242, section 3.3): pictures of the class, drawn by the frozen base."""

    weight: float = Field(default=1.0, ge=0.0)
    """lambda of the loss; 0 trains without."""
    images: int = Field(default=200, gt=0)
    """Class pictures drawn for each class noun (the paper: about 1000)."""
    sampling_steps: int = Field(default=25, gt=0)
    guidance_scale: float | None = Field(default=None, ge=1.0)
    """Of classifier-free guidance; 1 is without. FLUX.1 is told it instead. Default: 7.5, on SD3 4.5 and on FLUX.1
    3.5; the run's config.yaml says which."""
    cache: Path | None = None
    """Folder that keeps them for all runs. Default: prior/ beside the runs."""


class SubjectEncoders(Section):
    """What compares drawn pictures with a subject's own, of those that `dreambooth measure` takes. Default: nothing."""

    dino: Path | None = None
    """A folder of DINO that transformers reads, for subject fidelity and for copying."""
    clip: Path | None = None
    """A folder of CLIP that transformers reads, for prompt fidelity (CLIP-T), and CLIP-I."""
    efficientnet: bool = False
    """In place of DINO: an ImageNet EfficientNet of the `measure` extra, whose figures have another scale."""

    @property
    def compare(self) -> bool:
        return self.dino is not None or self.efficientnet


class SubjectValidationConfig(Section):
    """How subjects are looked at while they train. Nothing here but hold_out changes what is trained."""

    every_steps: int = Field(default=100, gt=0)
    """Of a subject: at step 0, then every so many, and at its last one. Losses with noise and timesteps that never
    change are logged then, of its pictures and of its class's, which tell its learning from the drift of its class."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Drawn then, with {identifier} and {class_noun} filled in for each subject, such as "a {identifier} {class_noun}
    on the beach". Those without {identifier} show what becomes of the class, and are not compared with the subject.
    Default: nothing is drawn."""
    pictures: int = Field(default=2, gt=0)
    """Of each prompt."""
    sampling_steps: int = Field(default=25, gt=0)
    guidance_scale: float | None = Field(default=None, ge=1.0)
    """As prior.guidance_scale."""
    hold_out: int = Field(default=0, ge=0)
    """So many pictures of each subject, the last by name, are not trained on, and give validation/held_out_loss."""
    encoders: SubjectEncoders = SubjectEncoders()
    """With dino or efficientnet, each validation says how near what it draws is to the subject's pictures. From that
    come the step at which a subject is learnt, the one from which it overfits, and best.safetensors between them."""

    @model_validator(mode="after")
    def _consistent(self) -> "SubjectValidationConfig":
        for number, prompt in enumerate(self.prompts):
            fill(f"prompts.{number}", prompt, identifier="x", class_noun="y")
        named = [prompt for prompt in self.prompts if "{identifier}" in prompt]
        if (self.encoders.compare or self.encoders.clip is not None) and not named:
            raise UserError(
                "encoders compare pictures of the subject with its own, and no prompt draws it: give some with "
                "{identifier} in prompts"
            )
        if self.encoders.dino is not None and self.encoders.efficientnet:
            raise UserError("encoders.dino and encoders.efficientnet are both given: take one of them")
        if self.encoders.clip is not None and not self.encoders.compare:
            raise UserError("encoders.clip needs dino or efficientnet beside it, by which subjects are compared")
        return self


class SubjectRunConfig(Section):
    """A DreamBooth run."""

    name: Name
    output: Path = Path("runs")
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    model: BaseConfig
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the frozen base; adapters and their optimizer are fp32."""
    resolution: int = Field(default=512, gt=0, multiple_of=8)
    flow: FlowConfig = FlowConfig()
    """Of bases of flow matching (SD3, FLUX.1) alone."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains adapters of many subjects in one batch. `full` trains all layers of the U-Net or the transformer,
    one subject after another, with all ranks and ZeRO on each, as the paper does."""
    train_text_encoder: bool = False
    """Train the text encoders too: all layers of them, or with `lora` adapters in their attention. T5, which SD3 and
    FLUX.1 have besides CLIP's, is never trained."""
    engine: EngineConfig = EngineConfig()
    """Of `full`: ZeRO stage, offload and activations. `precision` is that of the run, above it."""
    subjects_per_batch: int = Field(default=8, gt=0)
    """Of `lora`: subjects that one process trains together."""
    instance_batch_size: int = Field(default=1, gt=0)
    """Pictures of a subject in each step; as many of its class come besides, where prior.weight is not 0. With `full`
    the ranks share them, so their number is a multiple of the ranks'."""
    steps: int = Field(default=800, gt=0)
    learning_rate: float | None = Field(default=None, gt=0.0)
    """Default: 1e-4 for adapters, and the paper's 5e-6 for all layers."""
    optimizer: OptimizerName = "adamw"
    """Of `full`: as optimizer.name of a ControlNet's run. Adapters are moved by an AdamW of their own, which clips and
    skips each subject by itself."""
    weight_decay: float = Field(default=1e-2, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    min_snr_gamma: float | None = Field(default=None, gt=0.0)
    random_flip: bool = False
    """Mirror half of the sample visits. Wrong for subjects that carry writing."""
    instance_prompt: str = "a {identifier} {class_noun}"
    class_prompt: str = "a {class_noun}"
    identifiers: tuple[str, ...] = ()
    """Words to give to subjects that have none, in this order; `controlbooth dreambooth identifiers` finds some."""
    adapter: AdapterConfig = AdapterConfig()
    prior: PriorConfig = PriorConfig()
    checkpoint_every_steps: int = Field(default=200, gt=0)
    validation: SubjectValidationConfig = SubjectValidationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def default_learning_rate(self) -> float:
        return self.learning_rate or {"lora": 1e-4, "full": 5e-6}[self.method]

    @model_validator(mode="after")
    def _consistent(self) -> "SubjectRunConfig":
        if self.method == "lora" and self.engine != EngineConfig():
            raise UserError("engine is for method=full: adapters of a subject are trained by one rank alone")
        held = self.model.frozen
        if self.method == "full" and held != FrozenConfig():
            raise UserError(
                f"{held.in_words()} is for a base that stays frozen, and method=full trains all of it: leave it out"
            )
        if held.shards != "none":
            raise UserError(
                f"model.frozen.shards={held.shards} is for ControlNets: ranks that share blocks pass through them "
                "together, and each rank of a run of subjects trains its own, at its own pace. Leave it out"
            )
        if self.engine.precision != "auto":
            raise UserError(f"engine.precision={self.engine.precision} is set as `precision` in a run of subjects")
        if self.engine.compile:
            raise UserError("engine.compile is for ControlNets: leave it out in a run of subjects")
        if self.optimizer != "adamw" and self.method == "lora":
            raise UserError(
                f"optimizer={self.optimizer} is for method=full: adapters of many subjects are moved by one AdamW, "
                "which clips and skips each subject by itself. Leave it out"
            )
        for problem in (
            optimizer_problem(self.optimizer, "optimizer", self.engine),
            rate_problem(self.optimizer, "learning_rate", self.default_learning_rate),
            *activation_problems(self.engine),
        ):
            if problem is not None:
                raise UserError(problem)
        for field, template in (("instance_prompt", self.instance_prompt), ("class_prompt", self.class_prompt)):
            fill(field, template, identifier="x", class_noun="y")
        return self


def load_run(path: Path, overrides: Sequence[str] = ()) -> SubjectRunConfig:
    """Reads the run file of a DreamBooth run and applies overrides.

    Raises ConfigError with every mistake of the file.
    """
    tree = read_tree(path, overrides, SUBJECTS)
    try:
        return SubjectRunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_errors(error, SubjectRunConfig)}") from None


def fill(field: str, template: str, identifier: str, class_noun: str) -> str:
    """Fills the identifier and the class noun into a prompt template.

    Raises ValueError, naming the field, for a template that asks for other words or is malformed.
    """
    words = dict(identifier=identifier, class_noun=class_noun)
    try:
        asked = [(name, spec, how) for _, name, spec, how in Formatter().parse(template) if name is not None]
        if others := [name for name, spec, how in asked if name not in words or spec or how]:
            raise UserError(f"{{{others[0]}}} is none of its words")
    except ValueError as error:
        raise UserError(
            f"{field}={template!r} is no template ({error}); it may hold {{identifier}} and {{class_noun}}, and braces "
            "that are meant as such are doubled"
        ) from None
    return template.format(**words)
