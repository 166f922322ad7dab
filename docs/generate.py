"""Writes the reference pages from the code: fields, verbs, metrics, shards. MkDocs calls it while it builds the site.

The pages are part of the built site and not of the repository, so that they cannot fall behind the code. To read one
without building the site: `python docs/generate.py reference/configuration.md`. What the code does not say itself, such
as the meaning of a metric, is in the tables of this file; a name of the code that they lack, and one that the code has
no more, raise KeyError.
"""

import ast
import contextlib
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

from controlbooth.data import condition_names
from controlbooth.data.shards import sidecar
from controlbooth.deploy.retrain.policy import Policy
from controlbooth.launch import cli
from controlbooth.launch.commands.ablate import Ablations
from controlbooth.launch.job.cluster import Cluster
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import Section
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import Subject

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by docs/generate.py from the code. Correct the code, not this page. -->\n"

# Fields whose names and units say what they are, so that the code has no text for them.
PLAIN = {
    ("RunConfig", "output"): "Folder that holds the folders of runs.",
    ("RunConfig", "max_steps"): "Optimizer steps of the whole run.",
    ("OptimizerConfig", "warmup_steps"): "Optimizer steps in which the learning rate rises linearly to its peak.",
    ("OptimizerConfig", "betas"): "Of AdamW, in 8 bits too, of Prodigy, and of the AdamW beside Muon.",
    ("OptimizerConfig", "weight_decay"): "Decoupled from the gradient, as AdamW has it; of every optimizer.",
    ("OptimizerConfig", "epsilon"): "Of AdamW, in 8 bits too, of Prodigy, and of the AdamW beside Muon.",
    ("CheckpointConfig", "every_steps"): "Optimizer steps between two checkpoints; the last step has one too.",
    ("ValidationConfig", "every_steps"): "Optimizer steps between two validations; the last step has one too.",
    ("ValidationConfig", "sampling_steps"): "Steps of the sampler for each picture.",
    ("ValidationConfig", "micro_batch_size"): "Pictures that each rank draws at once.",
    ("TrackingConfig", "experiment"): "Of MLflow, which holds the runs.",
    ("SubjectRunConfig", "name"): "Names the folder of the run below `output`, and the run in MLflow.",
    ("SubjectRunConfig", "output"): "Folder that holds the folders of runs.",
    ("SubjectRunConfig", "seed"): "With the configuration and the pictures it determines the run.",
    ("SubjectRunConfig", "resolution"): "Side of the square training picture in pixels.",
    ("SubjectRunConfig", "steps"): "Optimizer steps of each subject.",
    ("SubjectRunConfig", "weight_decay"): "Decoupled from the gradient, as AdamW has it.",
    ("SubjectRunConfig", "max_grad_norm"): "Gradients of each subject are scaled down to this norm.",
    ("SubjectRunConfig", "min_snr_gamma"): "Min-SNR weighting of the loss (arXiv 2303.09556; the paper takes 5).",
    ("SubjectRunConfig", "instance_prompt"): "Prompt of a subject's own pictures.",
    ("SubjectRunConfig", "class_prompt"): "Prompt of the class pictures.",
    ("SubjectRunConfig", "checkpoint_every_steps"): "Optimizer steps between two checkpoints.",
    ("AdapterConfig", "rank"): "Of the low-rank matrices.",
    ("PriorConfig", "sampling_steps"): "Steps of the sampler for each class picture.",
    ("SubjectValidationConfig", "sampling_steps"): "Steps of the sampler for each picture.",
    ("Subject", "instance_prompt"): "Default: that of the run.",
    ("Subject", "class_prompt"): "Default: that of the run.",
    ("Subject", "steps"): "Default: those of the run.",
    ("Subject", "learning_rate"): "Default: that of the run.",
    ("Subject", "rank"): "Of its adapter. Default: that of the run.",
    ("Cluster", "engine"): "Where jobs run: this machine's background, Slurm or Kubernetes.",
    ("Cluster", "nodes"): "Machines of a job.",
    ("Cluster", "memory_gib_per_node"): "Asked for, in GiB. Default: what the engine gives.",
    ("SlurmConfig", "account"): "As `sbatch --account` takes it.",
    ("SlurmConfig", "qos"): "As `sbatch --qos` takes it.",
    ("KubernetesConfig", "namespace"): "In which jobs are made.",
    ("KubernetesConfig", "service_account"): "Of the pods.",
    ("KubernetesConfig", "storage"): "What is mounted in every pod.",
    ("Storage", "claim"): "Name of the persistent volume claim.",
    ("Storage", "read_only"): "Mount it so that pods cannot write.",
    ("Ablations", "name"): "Names the folder of the ablations below `output` of the run.",
    ("Ablations", "seeds"): "Each variant is trained once with each of them.",
    ("Ablations", "variants"): "By name: what each changes of the run.",
    ("Drift", "samples"): "Held-out samples that are drawn and measured.",
}

FIELDS = {  # page -> title, what a reader needs to know first, roots of the trees
    "reference/configuration.md": (
        "Run files",
        "A ControlNet run is one YAML file: `controlbooth train RUN.yaml`. Every field can also be set on the command "
        "line as `section.key=value`. Unknown keys are refused. Complete files are in `launch/configs/`.",
        {"": RunConfig},
    ),
    "reference/subjects.md": (
        "Files of subject runs",
        "A DreamBooth run has two files: the manifest, with a row for each subject, and the run, which holds what the "
        "subjects share: `controlbooth dreambooth run SUBJECTS RUN.yaml`. The manifest may be YAML, CSV, JSONL or "
        "Parquet.",
        {"A row of the manifest": Subject, "The run": SubjectRunConfig},
    ),
    "reference/cluster.md": (
        "cluster.yaml",
        "Says where a job runs: `controlbooth launch slurm RUN.yaml --cluster cluster.yaml`. Two complete ones are in "
        "`launch/configs/clusters/`.",
        {"": Cluster},
    ),
    "reference/policy.md": (
        "policy.yaml",
        "Says when to train again, on what, and what a new model must show to replace the old one: "
        "`controlbooth retrain tick policy.yaml`. `launch/configs/retrain.yaml` is one.",
        {"": Policy},
    ),
    "reference/ablations.md": (
        "Files of ablations",
        "Lists variants of one run, which `controlbooth ablate ABLATIONS.yaml` trains and measures side by side. "
        "`launch/configs/ablations.yaml` is one.",
        {"": Ablations},
    ),
}


def sections_of(annotation: Any) -> list[type[Section]]:
    """Finds the sections that a field holds, also in tuples and where it may be left out."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [one for part in typing.get_args(annotation) for one in sections_of(part)]


def described(section: type[Section], name: str) -> str:
    """Returns the text of a field, from the code or from PLAIN. Raises KeyError where neither has one, or both."""
    own = section.model_fields[name].description
    key = (section.__name__, name)
    if own and key in PLAIN:
        raise KeyError(f"{key} has a text in the code now: take it out of PLAIN")
    return one_line(own or PLAIN[key])


def one_line(text: str) -> str:
    """Joins the lines of a docstring, and escapes what Markdown or a table would take otherwise."""
    pieces = " ".join(text.split()).split("`")
    for outside in range(0, len(pieces), 2):
        for mark in ("*", "_", "<", "{"):
            pieces[outside] = pieces[outside].replace(mark, {"<": "&lt;", "{": "&#123;"}.get(mark, f"\\{mark}"))
    return "`".join(pieces).replace("|", "\\|")


def limits(metadata: typing.Sequence[Any]) -> str:
    """Says which numbers a field takes, such as " > 0"."""
    signs = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}
    told = []
    for one in metadata:
        if type(one) in signs:
            attribute, sign = signs[type(one)]
            bound = getattr(one, attribute)
            told.append(f"{sign} {'2^63' if bound == 2**63 else format(bound, 'g')}")
        elif isinstance(one, MultipleOf):
            told.append(f"and a multiple of {one.multiple_of}")
        elif isinstance(one, FieldInfo):
            told.append(limits(one.metadata))
    return ", ".join(part for part in told if part)


def type_name(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """Writes a type as a reader of YAML knows it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = limits(metadata)
    if origin is typing.Annotated:
        return type_name(parts[0], parts[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part, metadata) for part in parts if part is not type(None))
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"list of {plural(type_name(parts[0]))}"
        return f"{len(parts)} {plural(type_name(parts[0]))}"
    if origin is dict:
        return f"mapping of names to {plural(type_name(parts[1]))}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    name = "section" if isinstance(annotation, type) and issubclass(annotation, Section) else names[annotation]
    return f"{name} {bounds}".strip()


def plural(name: str) -> str:
    """Writes "number > 0" as "numbers > 0"; text has none."""
    first, _, rest = name.partition(" ")
    return " ".join([{"text": "texts"}.get(first, f"{first}s"), rest]).strip()


def default_of(field: FieldInfo) -> str:
    """Writes a default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | dict):
        return f"`{list(value) if isinstance(value, tuple) else value}`".replace("'", '"')
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def field_tables(section: type[Section], prefix: str, title: str, depth: int) -> Iterator[str]:
    """Writes a table of a section's own fields, and then its sections in the same way."""
    yield f"{'#' * depth} {title}\n" if title else ""
    # A docstring that is inherited tells of something else.
    if (text := section.__dict__.get("__doc__")) and prefix:
        yield one_line(text) + "\n"
    rows, inner = [], []
    for name, field in section.model_fields.items():
        found = sections_of(field.annotation)
        is_list = typing.get_origin(field.annotation) in (tuple, dict)
        if found and not field.description and not is_list:
            inner.append((name, found[0]))
            continue
        rows.append(
            f"| `{prefix}{name}` | {type_name(field.annotation, field.metadata)} | {default_of(field)} "
            f"| {described(section, name)} |"
        )
        if found:
            inner.append((f"{name}[]" if is_list else name, found[0]))
    if rows:
        yield "\n".join(["| field | type | default | what it is |", "| --- | --- | --- | --- |", *rows]) + "\n"
    for name, one in inner:
        yield from field_tables(one, f"{prefix}{name}.", f"{prefix}{name}", min(depth + 1, 4))


def fields_page(title: str, introduction: str, roots: dict[str, type[Section]]) -> str:
    """Writes a page of all fields of a kind of file."""
    parts = [NOTE, f"# {title}\n", introduction + "\n"]
    for name, section in roots.items():
        parts += field_tables(section, "", name, 2 if name else 1)
    return "\n".join(part for part in parts if part)


def help_of(verb: str) -> str:
    """Returns what `controlbooth VERB --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = cli.main([*verb.split(), "--help"])
    assert status == 0, f"controlbooth {verb} --help ends with {status}"
    return said.getvalue().rstrip()


def commands_page() -> str:
    """Writes a page of all verbs with their help."""
    os.environ["COLUMNS"] = "100"  # the width that argparse wraps at
    lines = [
        NOTE,
        "# Commands\n",
        "`controlbooth VERB --help` prints the same. Exit statuses: 0 when done, 2 for a mistake that the message "
        "explains, 130 after Ctrl-C. Some verbs have others, which their help lists.\n",
        "| verb | what it does |\n| --- | --- |",
    ]
    for verbs in cli.VERBS.values():
        lines += [f"| [`{verb}`](#{verb.replace(' ', '-')}) | {text} |" for verb, (_, text) in verbs.items()]
    for group, verbs in cli.VERBS.items():
        lines.append(f"\n## {group}\n")
        for verb in verbs:
            lines.append(f"### {verb} {{ #{verb.replace(' ', '-')} }}\n\n```text\n{help_of(verb)}\n```\n")
    return "\n".join(lines)


SYSTEM = {
    "cpu_percent": "load of all processors of the machine, percent",
    "memory_used_gib": "memory in use on the machine, GiB",
    "process_memory_gib": "memory of this process, GiB",
    "disk_free_gib": "free disk where the run's folder lies, GiB",
}
"""Under `system/` in MLflow. With NVIDIA GPUs also gpu_N_percent and gpu_N_memory_gib."""
STEP = {
    "loss": "mean training loss of the step over all ranks; it falls without telling whether the network obeys",
    "grad_norm": "norm of the gradients before clipping, over all ranks",
    "learning_rate": "of the ControlNet",
    "decoder_learning_rate": "of the base's decoder, once it learns",
    "lora_learning_rate": "of the low-rank differences of `model.method: lora`",
    "samples_per_second": "global batch size / seconds of the step",
    "step_seconds": "seconds of the step, waiting for data included",
    "stall_percent": "share of the step in which the slowest rank waited for data, percent",
    "queue_depth": "decoded steps that lie ready, on the rank that has the fewest",
    "fetch_seconds": "seconds that threads needed to read the step's bytes, slowest rank",
    "decode_seconds": "seconds that threads needed to decode them, slowest rank",
    "substitutions": "bad samples that were replaced in the step",
    "cache_hits": "reads of the step that found their shard in `data.cache`",
    "peak_memory_gib": "largest memory of a rank up to now, GiB: of the GPU, or of the process on a CPU",
    "skipped": "1 for a step without finite loss or gradients, which changes no weight",
    "slowest_rank": "the rank that computed longest in the step",
    "slowest_rank_ratio": "its time / the median of all ranks",
    "checkpoint_stall_seconds": "seconds for which a checkpoint stopped training",
    "convergence/step": "the step at which control came, from the validation on that announced it",
}
FIGURES = {
    "edge_f1": ("edges of the picture on the given edges, 0 to 1, corrected for chance", "higher"),
    "mask_iou": ("object of a scene on the true one: intersection over union, 0 to 1", "higher"),
    "line_f1": ("lines found again on the given lines, 0 to 1, corrected for chance", "higher"),
    "segmentation_miou": ("mean intersection over union of the classes, 0 to 1, corrected for chance", "higher"),
    "depth_rmse": ("scale-invariant error of depth, in units of the full range", "lower"),
    "depth_delta": ("share of pixels whose depth ratio is below 1.25, corrected for chance", "higher"),
    "normals_angle": ("mean angle between directions, degrees", "lower"),
    "pose_pck": ("share of key points found within 5 % of the shorter side", "higher"),
    "pose_oks": ("similarity of key points by distance, 0 to 1", "higher"),
    "soft_rmse": (
        "difference of levels, in units of the full range, for soft edges, gray and blurred pictures",
        "lower",
    ),
}
SUBJECT_STEP = {
    "train/instance_loss": "loss on the subject's own pictures",
    "train/prior_loss": "loss on the class pictures, where `prior.weight` is not 0",
    "train/samples_per_second": "of the job: pictures a second",
    "train/step_seconds": "of the job: seconds of a step, with what lies between two steps",
    "train/stall_percent": "of the job: share of that in which no step was computed",
    "train/peak_memory_gib": "of the job: largest memory of a rank, GiB",
    "train/subjects_in_training": "of the job: subjects that are trained now",
}
SUBJECT_VALIDATION = {
    "instance_loss": "loss on the subject's pictures, with noise and timesteps that never change",
    "prior_loss": "the same on class pictures",
    "held_out_loss": "the same on pictures that `validation.hold_out` keeps out of training",
    "dino": "mean similarity of drawn and own pictures; with `validation.encoders.efficientnet` names end with "
    "`efficientnet_lite0`",
    "nearest_dino": "similarity to the nearest own picture; it rises when pictures are copied",
    "real_dino": "similarity of the own pictures among themselves",
    "real_nearest_dino": "the same, each to its nearest",
    "clip_i": "mean similarity of drawn and own pictures by CLIP",
    "clip_t": "similarity of drawn pictures and their prompt, without the identifier, by CLIP",
}


def dict_keys(path: str, wanted: Callable[[ast.AST], bool]) -> list[str]:
    """Finds the names that are keys of dictionaries in a file of the project. wanted: which dictionaries."""
    tree = ast.parse((ROOT / path).read_text())
    return [
        key.value
        for node in ast.walk(tree)
        if wanted(node)
        for one in ast.walk(node)
        if isinstance(one, ast.Dict)
        for key in one.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    ]


def is_assigned(name: str) -> Callable[[ast.AST], bool]:
    """Tells assignments to a name."""
    return lambda node: (
        isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets)
    )


def is_function(name: str) -> Callable[[ast.AST], bool]:
    """Tells the definition of a function."""
    return lambda node: isinstance(node, ast.FunctionDef) and node.name == name


def logged_names() -> dict[str, set[str]]:
    """Finds in the code the names of the metrics that are logged: of steps, of the machine, of subjects, figures."""
    from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER
    from controlbooth.trainer.run.best import FIGURES as BEST

    subjects = {
        name
        for file in ("stack", "full")
        for name in dict_keys(f"trainer/dreambooth/{file}.py", lambda node: isinstance(node, ast.Module))
        if name.startswith("train/")
    }
    return {
        "step": {*dict_keys("trainer/controlnet/meter.py", is_assigned("metrics"))},
        "system": {*dict_keys("trainer/tracking/system.py", is_function("system_metrics"))},
        "subjects": subjects,
        "figures": {*BEST, *LOWER_IS_BETTER},
    }


def check_names() -> None:
    """Raises KeyError where the code logs a metric that the tables of this file do not explain."""
    tables = {"step": STEP, "system": SYSTEM, "subjects": SUBJECT_STEP, "figures": FIGURES}
    for group, names in logged_names().items():
        if unknown := names - set(tables[group]):
            raise KeyError(f"docs/generate.py does not explain {', '.join(sorted(unknown))}")


def metrics_page() -> str:
    """Writes a page of everything that is logged."""
    check_names()
    lines = [NOTE, "# Metrics\n"]
    lines.append(
        "All figures are lines of `metrics.jsonl` in the run's folder first, and reach MLflow from there. In MLflow "
        "names without a group begin with `train/`.\n"
    )
    lines += ["## Every step of a ControlNet run\n", *table(("name", "what it is"), STEP)]
    lines += ["## Figures of control\n"]
    lines.append(
        "The condition is found again in each generated picture and compared with the one that was given. "
        "[Measuring control](../concepts/control.md) explains chance and shares.\n"
    )
    rows = {name: f"{text} | {better}" for name, (text, better) in FIGURES.items()}
    lines += table(("name", "what it is", "better"), rows)
    lines.append(
        "A validation logs each of them as `validation/NAME`, and beside it:\n\n"
        "| ends with | what it is |\n| --- | --- |\n"
        "| `_chance` | the same pictures against the conditions of other samples |\n"
        "| `_real` | the real pictures |\n"
        "| `_share` | share of what is possible, (value - chance) / (real - chance) |\n"
        "| `_share_low`, `_share_high` | ends of its 95 % bootstrap interval |\n"
        "| `_empty_prompt`, `_empty_prompt_share` | with control and an empty prompt |\n"
        "| `_without_control`, `_without_control_share` | the base alone with the same captions |\n\n"
        "`validation/fixed_noise_loss` is the loss on the held-out set with noise and timesteps that never change. "
        "`controlbooth evaluate` logs the figures as `evaluation/NAME`, with `_chance` and `_share` of the first; "
        "`controlbooth study result` what people said, as `evaluation/human_rank_QUESTION` (1 is best) and "
        "`evaluation/human_points_QUESTION` (5 is best).\n"
    )
    lines += ["## Subjects\n", *table(("name", "what it is"), SUBJECT_STEP)]
    lines.append("Each validation of a subject logs, as `validation/NAME`:\n")
    lines += table(("name", "what it is"), SUBJECT_VALIDATION)
    lines.append(
        "`controlbooth dreambooth measure` logs `evaluation/NAME` in the run of each subject. The job's run counts "
        "subjects that are finished, failed, in training and left under `subjects/`.\n"
    )
    lines += ["## The machine\n", "Every `tracking.system_metrics_seconds`, under `system/`:\n"]
    lines += table(("name", "what it is"), SYSTEM)
    lines.append("With NVIDIA GPUs also `gpu_N_percent` and `gpu_N_memory_gib`.\n")
    return "\n".join(lines)


def table(head: tuple[str, ...], rows: dict[str, str]) -> list[str]:
    """Writes a table whose first column is code."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| `{k}` | {v} |" for k, v in rows.items())]
    return ["\n".join(lines) + "\n"]


FAULTS = {
    sidecar.MISSING_IMAGE: "never trained on",
    sidecar.MISSING_CAPTION: "never trained on",
    sidecar.MISSING_CONDITION: "not trained on by runs on that condition",
    sidecar.DUPLICATE: "never trained on",
    sidecar.BAD_IMAGE: "never trained on",
    sidecar.QUARANTINED: "not trained on until the flag is cleared",
}


def layout_of(path: str, begins: str) -> str:
    """Returns the indented block of a module's docstring whose first line begins with a word, without its indent."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    blocks = [block for block in text.split("\n\n") if block.lstrip().startswith(begins)]
    if not blocks:
        raise KeyError(f"{path} has no layout that begins with {begins}")
    lines = blocks[0].splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[indent:] for line in lines)


def row_fields(path: str, name: str) -> dict[str, str]:
    """Finds the fields of a dataclass and the text below each of them."""
    (definition,) = (
        node
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    fields: dict[str, str] = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and fields:
            fields[list(fields)[-1]] = one_line(str(node.value.value))
    return fields


ROW = {
    "bytes": "Size of the tar.",
    "samples": "Samples in it.",
    "index_hash": "Digest of its index.",
    "extensions": "Parts that samples have, such as `jpg`, `cond.canny.png`, `txt`.",
}
"""Of a manifest's row, where the code has no text."""


def shards_page() -> str:
    """Writes the page of the shard format."""
    fields = row_fields("data/shards/manifest.py", "ShardRow")
    if unknown := {name for name, text in fields.items() if not text} - set(ROW):
        raise KeyError(f"ROW of docs/generate.py lacks {', '.join(sorted(unknown))}")
    pictures = ", ".join(f"`{one}`" for one in condition_names.IMAGE_EXTENSIONS)
    flags = {text: FAULTS[bit] for bit, text in sidecar.FLAG_NAMES.items()}
    return "\n".join(
        [
            NOTE,
            "# Shard format\n",
            "Shards are plain tar files as WebDataset reads and writes them. All parts of a sample have one key, which "
            "ends at the first dot, and stand one after another:\n",
            "```text\n000123.jpg               the picture\n000123.cond.canny.png    a condition of the kind `canny`\n"
            "000123.txt               the caption\n```\n",
            "| part | names | holds |\n| --- | --- | --- |\n"
            f"| picture | {pictures}; the first of them where a sample has several | the target |\n"
            "| condition | `cond.KIND.png`, also `KIND.png` in shards of others; any picture format "
            "| lines, labels or levels, of the picture's own size or another |\n"
            f"| caption | {', '.join(f'`{one}`' for one in sidecar.CAPTION_EXTENSIONS)} "
            '| text, or `"..."`, `{"caption": "..."}`, `{"captions": ["...", "..."]}` |\n',
            "## Conditions\n",
            f"Made while loading, with `data.condition=computed:KIND`, or packed by `--condition KIND`: "
            f"{', '.join(f'`{one}`' for one in condition_names.COMPUTABLE)}.\n",
            f"Exact, in the built-in scenes: {', '.join(f'`{one}`' for one in condition_names.SCENE_KINDS)}.\n",
            "Any other kind can be packed. `controlbooth data annotate` adds those that networks make.\n",
            "## The index, `x.tar.idx`\n",
            "`controlbooth data index` writes it beside each tar. It says at which byte each part lies.\n",
            f"```text\n{layout_of('data/shards/sidecar.py', 'Layout')}\n```\n",
            "Flags of a sample:\n",
            *table_plain(("flag", "what follows"), flags),
            "## The manifest, `manifest.jsonl`\n",
            "One JSON row for each shard, in the order of the data set:\n",
            *table(("field", "what it is"), {name: text or ROW[name] for name, text in fields.items()}),
            "## The latent cache\n",
            "Written by `controlbooth data precompute`, see [the latent cache](../concepts/latent-cache.md).\n",
            f"```text\n{layout_of('data/shards/latent_cache.py', 'columns.json')}\n```\n",
        ]
    )


def table_plain(head: tuple[str, str], rows: dict[str, str]) -> list[str]:
    """Writes a table of two columns of text."""
    return [
        "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())]) + "\n"
    ]


LAYOUTS = (  # title, module with the layout in its docstring, how the layout begins
    ("Checkpoints", "trainer/run/checkpoint.py", "checkpoints/"),
    ("Which attempt may write", "trainer/run/attempt.py", "RUN/attempt.json"),
    ("A job", "launch/job/job.py", "job/run.yaml"),
    ("Validations of a subject", "trainer/dreambooth/validation.py", "RUN/subjects"),
    ("Tracking of subjects", "trainer/dreambooth/tracking.py", "RUN/metrics.jsonl"),
    ("Retraining", "deploy/retrain/rounds.py", "STATE/NAME"),
)


def run_folder_page() -> str:
    """Writes the page of a run's files: the overview that is written by hand, and the layouts of the code."""
    overview = (ROOT / "docs" / "reference" / "run-folder.md").read_text()
    parts = [NOTE, overview.rstrip() + "\n"]
    for title, path, begins in LAYOUTS:
        parts.append(f"## {title}\n\nFrom `{path}`:\n\n```text\n{layout_of(path, begins)}\n```\n")
    return "\n".join(parts)


COMING_FROM = {  # trainer -> its title and the commands that bring over what it had
    "diffusers": (
        "diffusers",
        "import data fill50k/ -o shards/ --condition fill",
        "import config train.sh --condition fill",
    ),
    "kohya": ("kohya's scripts", "import data dataset.toml -o shards/", "import config config.toml --samples 400"),
    "simpletuner": ("SimpleTuner", "import data multidatabackend.json -o shards/", "import config config.json"),
}


def import_table(name: str) -> list[str]:
    """Writes the counts and the rows of a table of another trainer's flags."""
    from controlbooth.trainer.imports.tables import counts, table

    told = ", ".join(f"{count} {kind}" for kind, count in counts(name).items())
    lines = [f"{len(table(name))}: {told}.\n", "| flag | here | what it becomes |\n| --- | --- | --- |"]
    for flag, entry in table(name).items():
        fields = [("of a run", entry.run), ("of subjects", entry.subjects)]
        same = entry.run == entry.subjects
        named = [f"`{entry.run}`"] if same and entry.run else [f"`{field}` {kind}" for kind, field in fields if field]
        why = entry.why.replace("|", "\\|")
        told = "; ".join(part for part in (", ".join(named), why) if part)
        lines.append(f"| `{flag}` | {entry.kind} | {told} |")
    return [*lines, ""]


def coming_from_page(trainer: str) -> str:
    """Writes the page of another trainer's flags, and of the keys by which it describes data."""
    from controlbooth.trainer.imports.tables import DATA_TABLES

    title, data, config = COMING_FROM[trainer]
    lines = [NOTE, f"# Coming from {title}\n"]
    lines.append(
        f"```sh\ncontrolbooth {data}\ncontrolbooth {config} -o run.yaml\n```\n\nBoth have `--dry-run`, which tells "
        "what was understood and what was left out. Taken is what becomes a field of the same meaning; equivalent, "
        "what is reached in another way; not needed, what is settled without being asked; missing, what is not here.\n"
    )
    lines += ["## Flags\n", *import_table(trainer)]
    if trainer in DATA_TABLES:
        lines += ["## Keys of the description of data\n", *import_table(DATA_TABLES[trainer])]
    return "\n".join(lines)


def pages() -> dict[str, Callable[[], str]]:
    """Returns the generated pages by their paths below docs/."""
    fields = {path: lambda told=told: fields_page(*told) for path, told in FIELDS.items()}
    coming = {f"coming-from/{name}.md": lambda name=name: coming_from_page(name) for name in COMING_FROM}
    return {
        **fields,
        **coming,
        "reference/commands.md": commands_page,
        "reference/run-folder.md": run_folder_page,
        "reference/shards.md": shards_page,
        "reference/metrics.md": metrics_page,
    }


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to the site. MkDocs calls it by this name, before it looks at links."""
    from mkdocs.structure.files import File

    for path, write in pages().items():
        if by_hand := files.get_file_from_path(path):  # to which the generated page adds
            files.remove(by_hand)
        files.append(File.generated(config, path, content=write()))
    return files


if __name__ == "__main__":
    for asked in sys.argv[1:] or pages():
        print(pages()[asked]())
