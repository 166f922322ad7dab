"""Every field of a run. YAML files and `section.key=value` overrides fill this one tree; unknown keys are refused.

Free of torch, so that the launcher can check a run before anything heavy is imported. The tree is frozen, and the
resolved one is saved with each checkpoint. Numbers that follow from others are functions at the end of this file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, field_validator, model_validator

from controlbooth.data.arguments import SEEDS
from controlbooth.data.condition_names import COMPUTED, MAX_PIXELS, computed_kind, tells_sides
from controlbooth.data.errors import UserError
from controlbooth.data.order.settings import OrderSettings
from controlbooth.data.secrets import without_secrets
from controlbooth.models.architectures import MINIATURE
from controlbooth.trainer.config.section import ConfigError, Section

RESOLVED = "config.yaml"
"""What a run's folder and its checkpoints hold: the resolved tree, as the run wrote it."""
BUILT_IN = "miniature"
"""As model.base: the base model that is shipped with controlbooth."""


def _all_none_or_a_share(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, float) and 0.0 < value < 1.0):
        return value
    raise UserError("true, false, or a share of the blocks between 0 and 1 is taken here, such as 0.5")


Recomputed = Annotated[bool | float, BeforeValidator(_all_none_or_a_share)]
"""Which blocks recompute their activations: all, none, or a share."""


class FrozenConfig(Section):
    """How the frozen base is held in memory. Its ControlNet is copied from whole weights before."""

    precision: Literal["engine", "bf16", "fp8", "int8", "nf4"] = "engine"
    """Of the linear layers in the blocks of the denoiser and of the text encoders; all else stays in the engine's
    precision, in which all is computed. int8 and fp8 are torchao's, with a scale a row, nf4 is bitsandbytes', with one
    for 64 weights: `pip install "controlbooth[quantized]"`. What is trained stays as it is. The same from start to
    end."""
    shards: Literal["none", "node", "world"] = "none"
    """Split each block of the denoiser over the ranks of a node, or over all ranks; it is gathered for its forward pass
    and again for its backward pass, ahead of use. Results are the same, bit for bit."""
    stream: Literal["none", "cpu"] = "none"
    """Keep the blocks of the denoiser and of the text encoders in host memory, from where they are copied to the device
    ahead of use. With shards, each rank keeps its share there. Results are the same, bit for bit."""

    def asked(self) -> dict[str, str]:
        """Returns the fields that are not at their defaults, by their names in a run, and their values."""
        return {
            f"model.frozen.{name}": value
            for name, value in self.model_dump().items()
            if value != FrozenConfig.model_fields[name].default
        }

    def in_words(self) -> str:
        """Names the fields that are not at their defaults, with their values, for a message."""
        return ", ".join(f"{field}={value}" for field, value in self.asked().items())


class ModelConfig(Section):
    base: str
    """A diffusers folder, a single .safetensors file, or `miniature` for the model shipped with controlbooth."""
    family: Literal["auto", "sd15", "sd21", "sdxl", "miniature", "sd3", "flux", "miniature-dit"] = "auto"
    """What the base is; `auto` reads it from the base's own configuration."""
    controlnet: str = "unet"
    """`unet`, or `base`, copies the trainable part from the base; a diffusers ControlNet folder continues from those
    weights."""
    copied_blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """How many of the base's first blocks a ControlNet of a transformer copies: [12] for SD3, [4, 4] for FLUX.1 (double
    and single ones). Default: these, or up to half of a smaller base."""
    condition_entry: Literal["latents", "pixels"] | None = None
    """What a ControlNet of SD3 reads of a condition: its latents in the base's VAE, or its pixels, by a hint network.
    Pixels keep fine lines that a VAE may lose; pipelines of diffusers know latents alone. Default: latents,
    or pixels for the miniature with a transformer."""
    t5: bool = True
    """Whether SD3's third text encoder, T5, is used; without it zeros stand in its place, as in the pipelines."""
    text_tokens: int | None = Field(default=None, ge=1, le=512)
    """To which T5's prompts are filled up or cut. Default: as in the pipelines, 256 for SD3 and 512 for FLUX.1. What
    fills up is read as words are, so inference wants the same number."""
    hint_channels: tuple[Annotated[int, Field(gt=0)], ...] = (16, 32, 96, 256)
    """Widths of the network that turns the condition image into the latent grid; one stride of 2 between neighbours.
    With a transformer as the base it is there where `condition_entry` is pixels."""
    hint_network: Literal["released", "paper"] = "released"
    """That of the released code, or the smaller one of the paper's text, whose widths are [16, 32, 64, 128]."""
    method: Literal["full", "lora"] = "full"
    """`lora` (control-LoRA) trains a few per cent of the parameters. Of U-Nets it leaves the copy as the base has it,
    and trains low-rank differences from it beside the hint network and the zero convolutions. FLUX.1 gets no ControlNet
    then: differences in its own layers are trained, and the condition's latents come in as channels beside the
    picture's. See `optimizer.lora_learning_rate`."""
    rank: int = Field(default=32, gt=0)
    """Of these differences."""
    trainable_copy: Literal["full", "lite"] = "full"
    """`lite` puts one convolution in place of each block of the copy: the paper's ablation."""
    connections: Literal["zero", "gaussian"] = "zero"
    """How the convolutions that tie the copy to the base start: `gaussian` is the paper's other ablation."""
    only_mid_control: bool = False
    """Train the middle block's residual alone, and leave the others at zero."""
    unlock_decoder_at: int | None = Field(default=None, ge=0)
    """From this optimizer step on, train the base's decoder too (the released code's `sd_locked=False`, which is for
    more than a million pairs, after 50,000 steps or more); 0 from the start. Default: it stays locked."""
    attention: Literal["auto", "xformers", "flash", "cudnn", "efficient", "math", "plain"] = "auto"
    """Memory-efficient attention: `xformers` needs CUDA and the package; the others are PyTorch's kernels, of which
    `cudnn` and `efficient` need CUDA; `plain` is matrix products alone. `auto` takes the fastest."""
    gradient_checkpointing: Recomputed = False
    """Recompute activations in the backward pass: less memory, about a third more time. A number between 0 and 1 does
    it for that share of the blocks of each network, on a U-Net those on the largest grids first, whose activations are
    the largest. Gradients are the same bit for bit."""
    frozen: FrozenConfig = FrozenConfig()

    @field_validator("controlnet")
    @classmethod
    def _has_one_name(cls, value: str) -> str:
        return "unet" if value == "base" else value


class FlowConfig(Section):
    """Of bases of flow matching (SD3, FLUX.1) alone."""

    density: Literal["logit-normal", "mode", "uniform"] = "logit-normal"
    """How levels of noise are drawn (arXiv 2403.03206, section 3.1)."""
    mean: float = Field(default=0.0, ge=-5.0, le=5.0)
    """Of the logit-normal density: above 0 draws less noise."""
    std: float = Field(default=1.0, gt=0.0, le=5.0)
    """Of the logit-normal density: a larger one draws more of the ends."""
    mode_scale: float = Field(default=1.29, ge=0.0, le=1.75)
    """Of the mode density."""
    shift: Literal["base"] | Annotated[float, Field(gt=0.0)] = "base"
    """Moves levels towards noise: sigma becomes s sigma / (1 + (s - 1) sigma). `base` takes the s of the base's own
    scheduler, which FLUX.1's makes of the picture's size; sampling always does."""
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Of the loss, by level."""
    embedded_guidance: float = Field(default=3.5, ge=0.0)
    """What FLUX.1-dev, which was distilled for guidance, is told in training."""


class SourceConfig(Section):
    """One of several data sets that a run draws from."""

    shards: str
    """As data.shards."""
    weight: float | None = Field(default=None, ge=0.0)
    """Its share of every batch, relative to the other weights; given for all sources or for none. It may be changed
    between two starts of a run: the new share holds from the step where the run goes on, and checkpoints record it."""
    repeat: int = Field(default=1, gt=0)
    """Without weights: how often each of its samples is seen while those of a source with repeat=1 are seen once."""


class DataConfig(Section):
    shards: str | None = None
    """A manifest.jsonl, a folder of tar shards, a glob, or a brace expression such as train-{000..099}.tar. Shards in
    http(s)://, s3:// or gs:// are named by the manifest that `controlbooth data index` wrote of them. Or, instead,
    `sources`."""
    sources: tuple[SourceConfig, ...] = ()
    """Several such data sets, mixed by weight or in proportion to their samples."""
    condition: str
    """Which condition of a sample to train on: `edges` reads key.cond.edges.png. `computed:canny_random` needs none: it
    is made of the cut and mirrored picture at each visit, with other thresholds each time. So can be: canny,
    canny_random, soft_edges, scribble, lineart, lines, gray, blur."""
    held_out: str | None = None
    """Shards that are never trained on, for validation. Without them nothing is validated."""
    resolution: int = Field(default=512, gt=0)
    """Side of the square training picture in pixels; a multiple of 8, the VAE's factor."""
    max_aspect_ratio: float = Field(default=1.0, ge=1.0, le=8.0)
    """Above 1: train on several shapes of about resolution**2 pixels, whose long side is at most so many short ones.
    Each picture goes to the nearest shape, and each step has one, on all ranks. 1 cuts squares out of all pictures."""
    aspect_step: int = Field(default=64, gt=0)
    """Sides of these shapes are multiples of it: 64 for Stable Diffusion, 16 for the miniature."""
    prompt_dropout: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of sample visits whose prompt is replaced by the empty string (ControlNet: 0.5)."""
    random_flip: bool = False
    """Mirror half of the sample visits, picture and condition alike. Wrong where captions say left and right, and
    refused for poses and key points, whose colours do."""
    random_crop: bool = False
    """Crop at a random place rather than at the centre where a picture is not square."""
    lanes: int | None = Field(default=None, gt=0)
    """Streams into which an epoch is cut; every world size of a run divides it. Default: global_batch_size."""
    shards_per_block: int = Field(default=2, gt=0)
    """Shards that each lane permutes as one block."""
    threads: int = Field(default=2, gt=0)
    """Threads of each rank that read and decode."""
    prefetch_steps: int = Field(default=4, gt=0)
    """Steps of decoded batches that each rank holds ready."""
    cache: Path | None = None
    """Folder on a local disk of each node for shards of http(s), s3 or gs, which need one; ranks and runs share it."""
    cache_gib: float = Field(default=100.0, gt=0.0)
    """What the cache may hold; the shards used last stay. Room for lanes * shards_per_block shards over the nodes is
    needed, and twice that lets each next shard be fetched before its lane reaches it."""
    latent_cache: Path | None = None
    """Folder of the latent and text-embedding cache, which `controlbooth data precompute` writes there and the run then
    takes instead of running the VAE and the text encoder: also of conditions, where a ControlNet reads their latents.
    Not with random_crop."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0)
    """A sample with a larger picture, target or condition, is bad: it would take 3 bytes of memory for each pixel."""
    max_bad_rate: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of undecodable samples at which the run stops instead of replacing them."""

    @property
    def condition_name(self) -> str:
        """Returns the kind of condition, whether it is stored with the samples or computed."""
        return self.condition.removeprefix(COMPUTED)

    @field_validator("condition")
    @classmethod
    def _can_be_computed(cls, value: str) -> str:
        computed_kind(value)
        return value

    @field_validator("resolution")
    @classmethod
    def _divides(cls, value: int) -> int:
        if value % 8:
            near = sorted({max(8, value // 8 * 8), -(-value // 8) * 8})
            raise UserError(f"not a multiple of 8, the VAE's factor. Use {' or '.join(map(str, near))}")
        return value


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Of a folder: most disks take 255 bytes, and names of files in the making are some longer."""


OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "muon"]
PRODIGY_RATES = (0.1, 10.0)
"""What optimizer.learning_rate may be with Prodigy, whose authors advise 1."""


def rate_problem(name: str, field: str, rate: float) -> str | None:
    """Says why a learning rate makes no sense with an optimizer, and the remedy; None where it may. field: its own."""
    low, high = PRODIGY_RATES
    if name != "prodigy" or low <= rate <= high:
        return None
    return (
        f"Prodigy finds the learning rate itself and multiplies it by {field}, which is {rate:g}: set {field}=1, or "
        f"another number from {low:g} to {high:g}"
    )


class OptimizerConfig(Section):
    name: OptimizerName = "adamw"
    """What moves the weights, and keeps for each of them so many bytes: AdamW 8; AdamW with moments of 8 bits (of
    bitsandbytes) 2; Adafactor (of PyTorch) a row and a column of each matrix, nearly 0; Muon (of PyTorch) 4, with AdamW
    for what is no matrix between the network's ends; Prodigy 16, which finds the learning rate itself, on one rank. All
    but AdamW need engine.zero_stage 1 or 2. The same from a run's start to its end."""
    learning_rate: float = Field(default=1e-5, gt=0.0)
    """Peak learning rate, reached after warmup_steps (ControlNet: 1e-5). Muon's updates are brought to the size of
    AdamW's, so that the same is right; Adafactor's is relative to the size of each tensor's weights, 1e-3 a usual one;
    Prodigy multiplies its own by it: 1."""
    decoder_learning_rate: float = Field(default=2e-6, gt=0.0)
    """The same of the decoder, from model.unlock_decoder_at on. The released code advises 2e-6 once it is unlocked, and
    has one rate for all: set learning_rate to it too for that."""
    lora_learning_rate: float | None = Field(default=None, gt=0.0)
    """The same of the low-rank differences of model.method=lora, which need a larger one than whole weights. Default:
    20 times learning_rate, which the hint network and the zero convolutions keep; of FLUX.1 all are differences."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warmup; linear and cosine end at 0 at max_steps."""
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-2, ge=0.0)
    epsilon: float = Field(default=1e-8, gt=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0, allow_inf_nan=True)  # .inf does not clip
    """Gradients are scaled down to this norm, taken over all trained parameters and all ranks."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps with a non-finite loss or gradient that are skipped and reported before the run stops."""
    min_snr_gamma: float | None = Field(default=None, gt=0.0)
    """Min-SNR weighting of the loss (arXiv 2303.09556; the paper takes 5)."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep an exponential moving average of the trained weights, and validate and export that."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        for key in ("betas", "epsilon"):
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.name == "adafactor" and value != default:
                raise UserError(
                    f"optimizer.{key} is of Adam's moments, which optimizer.name=adafactor has not: leave it out"
                )
        if problem := rate_problem(self.name, "learning_rate", self.learning_rate):
            raise UserError(problem)
        return self


class EngineConfig(Section):
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of weights and activations under DeepSpeed. `auto` takes bf16 where the device multiplies in it, else fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 splits optimizer states over ranks, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory (stage 3)."""
    activations: Literal["device", "cpu"] = "device"
    """Where a GPU keeps what the backward pass needs of the forward pass: `cpu` is the host's memory (stages 0 to 2),
    which takes time by the bus between them. With model.gradient_checkpointing, what the blocks begin with is there
    too. Gradients are the same bit for bit."""
    deterministic: bool = True
    """A GPU gives the same bits for the same work, so that a resumed run is the one that went on. `false` lets it take
    whichever kernels are fastest: a resume is then equal within rounding only. Processors give the same bits anyway."""
    tf32: bool = False
    """Let a GPU multiply float32 in TF32, with 10 bits of the fraction instead of 23: for runs in fp32, several times
    as fast."""
    compile: bool = False
    """Compile the blocks that the networks repeat with torch.compile (stages 0 to 2). At each start one step is taken
    with and without, and what has other gradients is not compiled, aloud."""
    hang_timeout_seconds: float = Field(default=900.0, gt=0.0, allow_inf_nan=True)  # .inf waits for ever
    """A step that takes longer is taken for one that hangs: the ranks write their stacks and end. The start, the first
    step, validations and checkpoints may take six times as long, and anything ten times the slowest of its kind. The
    default is more than a store of shards may be away."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=2, gt=0)
    """Latest checkpoints that are kept; an older one is deleted only after a newer one is complete."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints kept besides, by the validation's figure of control: that of the trained kind, or edge F1."""


class ValidationConfig(Section):
    every_steps: int = Field(default=1000, gt=0)
    samples: int = Field(default=16, gt=0)
    """Held-out conditions that are sampled and measured, spread over ranks."""
    grid: int = Field(default=4, gt=0)
    """How many of them are shown in the picture."""
    sampling_steps: int = Field(default=20, gt=0)
    guidance_scale: float | None = Field(default=None, ge=1.0)
    """Of classifier-free guidance away from the empty prompt; 1 is without. FLUX.1 is told it instead. Default: 7.5, on
    SD3 4.5 and on FLUX.1 3.5; the run's config.yaml says which."""
    micro_batch_size: int = Field(default=8, gt=0)
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Prompts of your own: each validation draws them too, under the held-out conditions that are shown, as a picture
    beside the one of the captions (samples/prompts/). They are not measured."""
    at_start: bool = True
    """Validate before the first step too: the figures without control."""
    stop_after_convergence: int | None = Field(default=None, ge=0)
    """End the run so many steps after the one for which control is announced. Default: go on to max_steps."""


class TrackingConfig(Section):
    uri: str | None = None
    """An MLflow server or store, e.g. http://host:5000. Default: SQLite in the folder that holds the runs. Users and
    passwords are refused here; MLflow takes them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or a token
    from MLFLOW_TRACKING_TOKEN, in the environment of whatever starts."""
    experiment: str = "controlbooth"
    system_metrics_seconds: float = Field(default=10.0, gt=0.0)
    """How often memory and processor load are logged."""

    @field_validator("uri")
    @classmethod
    def _has_no_secret(cls, value: str | None) -> str | None:
        if value is not None:
            refuse_secrets(value)
        return value


class RunConfig(Section):
    name: Name
    """Names the folder of the run below `output`, and the run in MLflow."""
    output: Path = Path("runs")
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    """With the configuration and the data set's fingerprint it determines the run."""
    max_steps: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks; the number that the learning rate was tuned for."""
    micro_batch_size: int = Field(gt=0)
    """Samples per forward pass on one rank; lower it when memory runs out."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    flow: FlowConfig = FlowConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if (self.data.shards is None) == (not self.data.sources):
            raise UserError(
                "'data.shards' is missing; set it in the file, or give data.shards=VALUE on the command line"
                if self.data.shards is None
                else "data.shards and data.sources are both set: move the shards into a source of their own"
            )
        given = [source.weight for source in self.data.sources if source.weight is not None]
        if given and (len(given) < len(self.data.sources) or not any(given)):
            raise UserError(
                f"data.sources have the weights {[source.weight for source in self.data.sources]}: give one to every "
                "source, not all of them 0, or to none, which takes them by their samples"
            )
        if given and any(source.repeat != 1 for source in self.data.sources):
            raise UserError("data.sources have weights and a repeat: a weight says it all, leave repeat out")
        if self.engine.compile and self.engine.zero_stage == 3:
            raise UserError(
                "engine.compile=true needs whole weights, and engine.zero_stage=3 gathers them layer by layer: set "
                "engine.zero_stage=2, or engine.compile=false"
            )
        if self.engine.compile and self.model.unlock_decoder_at is not None:
            raise UserError(
                "engine.compile=true proves the gradients of a network whose decoder is locked, and "
                f"model.unlock_decoder_at={self.model.unlock_decoder_at} unlocks it: leave one of them out"
            )
        for problem in activation_problems(self.engine):
            raise UserError(problem)
        if self.model.frozen != FrozenConfig():
            held = self.model.frozen.in_words()
            if self.model.unlock_decoder_at is not None:
                raise UserError(
                    f"{held} is for a base that stays frozen, and model.unlock_decoder_at="
                    f"{self.model.unlock_decoder_at} trains its decoder: leave one of them out"
                )
            if self.engine.compile:
                raise UserError(
                    f"engine.compile=true is for a base that is held whole, and {held} is set: leave one of them out"
                )
        if self.data.random_flip and tells_sides(self.data.condition):
            raise UserError(
                f"data.condition={self.data.condition} tells left from right by colour, and data.random_flip would "
                "mirror its places and not its colours: set data.random_flip=false"
            )
        if self.data.latent_cache and computed_kind(self.data.condition):
            raise UserError(
                f"data.condition={self.data.condition} is made of the pictures, which "
                f"data.latent_cache={self.data.latent_cache} stands for: leave data.latent_cache out, or write the "
                "condition into shards by `controlbooth data annotate`"
            )
        if self.data.latent_cache and self.data.random_crop:
            raise UserError(
                f"data.latent_cache={self.data.latent_cache} has latents of pictures cut at the centre, and "
                "data.random_crop wants others at every visit: set data.random_crop=false, or leave "
                "data.latent_cache out"
            )
        lanes = self.data.lanes or self.global_batch_size
        if lanes % self.global_batch_size:
            raise UserError(
                f"data.lanes={lanes} is not a multiple of global_batch_size={self.global_batch_size}. "
                f"Leave data.lanes out, or use {self.global_batch_size * max(1, lanes // self.global_batch_size)}"
            )
        if self.model.controlnet != "unet":
            for key in ("trainable_copy", "connections", "hint_network"):
                if getattr(self.model, key) != ModelConfig.model_fields[key].default:
                    raise UserError(
                        f"model.{key}={getattr(self.model, key)} is how a new ControlNet starts, and "
                        f"model.controlnet={self.model.controlnet} has started: leave one of them out"
                    )
        self._check_method()
        unlock = self.model.unlock_decoder_at
        if unlock is not None and unlock >= self.max_steps:
            raise UserError(
                f"model.unlock_decoder_at={unlock} is never reached: the run ends at max_steps={self.max_steps}. Raise "
                "max_steps, or leave the decoder locked by leaving it out"
            )
        rate, default = self.optimizer.decoder_learning_rate, OptimizerConfig().decoder_learning_rate
        if unlock is None and rate != default:
            raise UserError(
                f"optimizer.decoder_learning_rate={rate:g} is for a decoder that learns, and it stays locked: say from "
                "which step by model.unlock_decoder_at, or leave the rate out"
            )
        if self.engine.offload_parameters and self.engine.zero_stage != 3:
            raise UserError(
                f"engine.offload_parameters needs engine.zero_stage=3, and it is {self.engine.zero_stage}. "
                "Set engine.zero_stage=3, or offload the optimizer only"
            )
        if self.engine.offload_optimizer and self.engine.zero_stage == 0:
            raise UserError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3, and it is 0")
        if problem := optimizer_problem(self.optimizer.name, "optimizer.name", self.engine):
            raise UserError(problem)
        if self.optimizer.name != "adamw" and unlock is not None:
            raise UserError(
                f"model.unlock_decoder_at={unlock} hands AdamW's moments from one engine to the next, and "
                f"optimizer.name={self.optimizer.name} has others: leave one of them out"
            )
        if self.optimizer.warmup_steps > self.max_steps:
            raise UserError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than max_steps={self.max_steps}"
            )
        if self.validation.stop_after_convergence is not None and not self.data.held_out:
            raise UserError(
                f"validation.stop_after_convergence={self.validation.stop_after_convergence} needs validations, and "
                "data.held_out is not set: name held-out shards, or leave it out"
            )
        if self.validation.grid > self.validation.samples:
            raise UserError(
                f"validation.grid={self.validation.grid} pictures cannot be shown of "
                f"validation.samples={self.validation.samples}. Lower the one or raise the other"
            )
        return self

    def _check_method(self) -> None:
        """Raises ValueError for settings that do not go with model.method."""
        model, rate = self.model, self.optimizer.lora_learning_rate
        if model.method == "full":
            if model.rank != ModelConfig.model_fields["rank"].default:
                raise UserError(f"model.rank={model.rank} is of model.method=lora: set that too, or leave the rank out")
            if rate is not None:
                raise UserError(
                    f"optimizer.lora_learning_rate={rate:g} is for the low-rank differences of model.method=lora: set "
                    "that too, or leave the rate out"
                )
            return
        others = {
            "model.trainable_copy": model.trainable_copy != "full" and model.trainable_copy,
            "model.hint_network": model.hint_network != "released" and model.hint_network,
            "model.unlock_decoder_at": model.unlock_decoder_at is not None and str(model.unlock_decoder_at),
            "engine.compile": self.engine.compile and "true",
            "optimizer.name": self.optimizer.name != "adamw" and self.optimizer.name,
            **{field: value for field, value in model.frozen.asked().items() if not field.endswith(".precision")},
        }
        for field, value in others.items():
            if value:
                raise UserError(f"{field}={value} does not go with model.method=lora: leave one of them out")


def activation_problems(engine: EngineConfig, on_gpu: bool = True) -> Iterator[str]:
    """Says why activations cannot be kept in host memory under an engine's settings, each with the remedy."""
    if engine.activations == "device":
        return
    if not on_gpu:
        yield "engine.activations=cpu moves what a GPU keeps to the host, and this run is on a CPU: leave it out"
    if engine.zero_stage == 3:
        yield (
            "engine.activations=cpu would copy the weights that engine.zero_stage=3 gathers, too: set "
            "engine.zero_stage=2, or leave it out"
        )
    if engine.compile:
        yield "engine.activations=cpu and engine.compile=true were never proved together: leave one of them out"


def optimizer_problem(name: str, field: str, engine: EngineConfig) -> str | None:
    """Says why an optimizer cannot work under an engine's settings, and the remedy; None where it can.

    field: by which it was asked for.
    """
    if name == "adamw" or (engine.zero_stage in (1, 2) and not engine.offload_optimizer):
        return None
    if engine.offload_optimizer:
        return f"{field}={name} is not offloaded: set engine.offload_optimizer=false, or {field}=adamw"
    return (
        f"{field}={name} moves whole tensors, which engine.zero_stage={engine.zero_stage} does not hand over: set "
        f"engine.zero_stage=2, which is the same on one rank and splits the states over several, or {field}=adamw"
    )


def gradient_accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Returns how many forward passes each rank makes per optimizer step.

    Raises ConfigError where global_batch_size is not a multiple of micro_batch_size * world_size.
    """
    samples_per_pass = config.micro_batch_size * world_size
    if config.global_batch_size % samples_per_pass:
        passes = config.global_batch_size / config.micro_batch_size
        ranks = [str(n) for n in range(1, int(passes) + 1) if passes % n == 0]
        possible = ", ".join(ranks) or "none with this micro_batch_size"
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size * world_size = "
            f"{config.micro_batch_size} * {world_size} = {samples_per_pass}. "
            f"Change micro_batch_size, or start on another number of ranks (possible: {possible})."
        )
    return config.global_batch_size // samples_per_pass


def sources(config: RunConfig) -> tuple[SourceConfig, ...]:
    """Returns the sources from which the run draws its samples; data.shards counts as a single source."""
    return (SourceConfig(shards=config.data.shards),) if config.data.shards else config.data.sources


def data_set_name(config: RunConfig) -> str:
    """Describes the sources in one line: the shards of each, with its weight and repeats where they are set."""
    return ", ".join(
        source.shards
        + (f" (weight {source.weight:g})" if source.weight is not None else "")
        + (f" (x {source.repeat})" if source.repeat > 1 else "")
        for source in sources(config)
    )


LORA_RATE = 20.0
"""Of low-rank differences: their learning rate in those of whole weights."""


def lora_learning_rate(config: RunConfig) -> float:
    """Returns the peak learning rate of low-rank differences."""
    own = config.optimizer.lora_learning_rate
    return LORA_RATE * config.optimizer.learning_rate if own is None else own


def lanes(config: RunConfig) -> int:
    return config.data.lanes or config.global_batch_size


def order_settings(config: RunConfig) -> OrderSettings:
    """Returns what, beside the data, decides in which order samples come and in which shapes."""
    data = config.data
    return OrderSettings(
        seed=config.seed,
        lanes=lanes(config),
        shards_per_block=data.shards_per_block,
        global_batch_size=config.global_batch_size,
        resolution=data.resolution,
        condition=data.condition,
        max_aspect_ratio=data.max_aspect_ratio,
        aspect_step=data.aspect_step,
    )


def run_folder(config: RunConfig) -> Path:
    return config.output / config.name


def base_path(config: RunConfig) -> Path:
    """Returns the folder or file of the run's base model."""
    return base_folder(config.model.base)


def base_folder(name: str) -> Path:
    """Returns the folder or file of a base model; `miniature` is the one shipped with controlbooth."""
    return MINIATURE if name == BUILT_IN else Path(name)


class Tracked(Protocol):
    """A run of whatever kind, as MLflow keeps it."""

    @property
    def output(self) -> Path: ...

    @property
    def tracking(self) -> TrackingConfig: ...


def tracking_uri(config: Tracked) -> str:
    """Returns the URI at which MLflow keeps this run: the configured server, or mlflow.db beside the runs."""
    return config.tracking.uri or f"sqlite:///{(config.output / 'mlflow.db').absolute()}"


FOR_SERVERS = "give them to MLflow in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


FOR_DATABASES = "give the password to the database's client, for PostgreSQL in PGPASSWORD or ~/.pgpass"


def refuse_secrets(uri: str) -> None:
    """Raises ValueError for a URI with a secret in it, which the message does not show.

    Secrets are passwords, the user of an HTTP server, and secret parameters.
    """
    clean = without_secrets(uri)
    if clean != uri:
        remedy = FOR_SERVERS if clean.startswith("http") else FOR_DATABASES
        raise UserError(
            f"a user or a password was given in it, not shown here, which would be kept in the run's files. "
            f"Write {clean}, and {remedy}"
        )
