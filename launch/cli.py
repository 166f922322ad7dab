"""The `controlbooth` command: finds a verb's function, calls it with the rest of the line, and shows its errors.

The functions are named as strings and imported when their verb is called, so that help needs nothing but the standard
library, and the table below is the whole command line. Each takes a list of arguments and returns an exit status.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from controlbooth.data.errors import Explained
from controlbooth.data.secrets import shown
from controlbooth.launch.ranks.torchrun import SPIN_COUNT

VERBS = {  # group -> verb -> (module[:function] of controlbooth, what it does); the function is main
    "Training": {
        "quickstart": ("launch.commands.quickstart", "train a ControlNet on this machine, from nothing"),
        "init": ("launch.commands.init", "write a run file from data, a base and a card, with reasons"),
        "train": ("launch.commands.train", "run a training on this machine, or resume it"),
        "plan": ("launch.commands.plan", "memory, time and price of a run before it is started"),
        "sample": ("launch.commands.sample", "draw pictures with one ControlNet or several"),
        "evaluate": ("launch.commands.evaluate", "measure a ControlNet on held-out conditions"),
        "compare": ("launch.commands.compare", "what one ControlNet gains over another"),
        "report": ("launch.commands.report", "one page with everything about a run"),
        "watch": ("launch.commands.watch", "show runs in a browser while they train"),
        "mirror": ("launch.commands.mirror", "copy figures for TensorBoard or Weights & Biases"),
        "ablate": ("launch.commands.ablate", "train variants of a run and measure them side by side"),
        "export": ("launch.commands.export", "write a checkpoint in the format that diffusers loads"),
    },
    "DreamBooth": {
        "dreambooth demo": ("launch.commands.dreambooth_demo", "train and measure unseen subjects, from nothing"),
        "dreambooth run": ("launch.commands.dreambooth_run", "train many subjects, several in each batch"),
        "dreambooth export": ("launch.commands.dreambooth_export", "write a subject's LoRA for other programs"),
        "dreambooth identifiers": ("launch.commands.dreambooth_identifiers", "find words that mean nothing to a base"),
        "dreambooth subjects": (
            "launch.commands.dreambooth_subjects",
            "draw subjects that the built-in base never saw",
        ),
        "dreambooth measure": ("launch.commands.dreambooth_measure", "measure subjects as the paper does"),
    },
    "Studies": {
        "study new": ("launch.commands.study_new", "make a blind comparison of pictures, for people to judge"),
        "study serve": ("launch.commands.study_serve", "serve its page to raters, and keep their answers"),
        "study result": ("launch.commands.study_result", "what the answers show, and how many are still needed"),
    },
    "Clusters": {
        "launch local": ("launch.submit:local_main", "run in the background of this machine"),
        "launch slurm": ("launch.submit:slurm_main", "submit a run, or an array of subjects, to Slurm"),
        "launch kubernetes": ("launch.submit:kubernetes_main", "submit a run, or subjects, to Kubernetes"),
        "launch status": ("launch.follow:status_main", "how a job and its run are doing"),
        "launch logs": ("launch.follow:logs_main", "what all attempts of a job have said"),
        "launch cancel": ("launch.follow:cancel_main", "end a job, with a checkpoint"),
        "launch resume": ("launch.follow:resume_main", "submit a job again; its run goes on"),
        "launch check": ("launch.preflight.nodes", "look from every node at what a job needs"),
    },
    "Retraining": {
        "retrain tick": ("deploy.retrain.commands:main_tick", "train again if it is time; measure, and promote"),
        "retrain status": ("deploy.retrain.commands:main_status", "the champion, the open round, what is due"),
        "retrain rollback": ("deploy.retrain.commands:main_rollback", "return to the champion before"),
        "retrain history": ("deploy.retrain.commands:main_history", "all that was decided, and why"),
    },
    "Data": {
        "data pack": ("launch.commands.data_pack", "write pictures, captions and conditions into tar shards"),
        "data annotate": ("launch.commands.data_annotate", "add conditions to shards, by functions or networks"),
        "data index": ("launch.commands.data_index", "check tar shards and index them beside the tars"),
        "data info": ("launch.commands.data_info", "sizes, conditions and faults of a data set"),
        "data show": ("launch.commands.data_show", "look at samples as the trainer sees them"),
        "data order": ("launch.commands.data_order", "which samples a step reads, on which rank"),
        "data explain": ("launch.commands.data_explain", "every step of a run that sees one sample, and how"),
        "data bench": ("launch.commands.data_bench", "how fast a data set is read and decoded here"),
        "data lint": ("launch.commands.data_lint", "find copies, mismatched pairs, broken and useless samples"),
        "data stats": ("launch.commands.data_stats", "lengths and frequencies of captions, sizes of pictures"),
        "data precompute": ("launch.commands.data_precompute", "write a run's latents and text embeddings once"),
        "data quarantine": ("launch.commands.data_quarantine", "leave the bad samples of a run out of the next"),
    },
    "Coming from other trainers": {
        "import data": ("launch.commands.import_data", "data in the layout of another trainer, to shards or subjects"),
        "import config": ("launch.commands.import_config", "flags of another trainer, to a run file"),
    },
}
TABLE = {verb: entry for group in VERBS.values() for verb, entry in group.items()}

EXAMPLES = {  # the first word of a group's verbs, or nothing for all verbs -> command lines
    "": (
        "quickstart",
        "train launch/configs/quickstart.yaml max_steps=200",
        "train run.yaml --processes 8 --dry-run",
        "data index shards/",
    ),
    "dreambooth": (
        "dreambooth demo",
        "dreambooth run subjects.yaml run.yaml --dry-run",
        "dreambooth measure runs/subjects",
    ),
    "study": (
        "study new study --methods early=runs/x/checkpoints/step-00000400 late=runs/x",
        "study serve study",
        "study result study",
    ),
    "launch": (
        "launch slurm run.yaml --cluster cluster.yaml --dry-run",
        "launch status runs/my-run",
        "launch logs runs/my-run --follow",
        "launch resume runs/my-run max_steps=20000",
    ),
    "retrain": (
        "retrain tick policy.yaml --dry-run",
        "retrain status policy.yaml",
        "retrain rollback policy.yaml",
    ),
    "data": (
        "data pack photos/ -o shards/ --condition canny --held-out 5%",
        "data lint shards/train",
        "data show shards/train --resolution 512",
        "data order shards/train --step 1000 --world-size 8",
    ),
    "import": (
        "import data pictures/ --dry-run",
        "import data dataset_config.toml -o shards/",
        "import config train.sh --condition canny -o run.yaml",
    ),
}

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status: 0, 2 for a mistake that a message explains, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"controlbooth {importlib.metadata.version('controlbooth')}")
        return 0
    verb = next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in TABLE), None)
    if verb is None:
        return _no_verb(words)
    try:
        return _call(verb, words[len(verb.split()) :])
    except KeyboardInterrupt:
        print("\ncontrolbooth: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as in `controlbooth data show ... | head`. Python would complain again as it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        print(f"controlbooth {verb}: {str(error) or 'this machine has no memory left'}", file=sys.stderr)
        return USER_ERROR
    except (ValueError, OSError) as error:
        if not _is_message(error):
            raise
        print(f"controlbooth {verb}: {shown(str(error))}", file=sys.stderr)
        return USER_ERROR


def _call(verb: str, arguments: list[str]) -> int:
    if "OMP_WAIT_POLICY" not in os.environ:  # as in torchrun_environment, and before torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    module, _, function = TABLE[verb][0].partition(":")
    try:
        return getattr(importlib.import_module(f"controlbooth.{module}"), function or "main")(arguments) or 0
    except SystemExit as stop:
        if isinstance(stop.code, str):  # raise SystemExit("message") would end with status 1
            print(f"controlbooth {verb}: {shown(stop.code)}", file=sys.stderr)
            return USER_ERROR
        return int(stop.code or 0)


def _is_message(error: BaseException) -> bool:
    """Tells whether this project wrote the message for people, or the system named a file that it could not use.

    Other errors of the same types, such as numpy's about shapes, are defects, and are shown with their traceback.
    """
    return isinstance(error, Explained) or (isinstance(error, OSError) and error.filename is not None)


def _no_verb(words: list[str]) -> int:
    """Prints help where it was asked for or nothing was, and otherwise the nearest verb. Returns the exit status."""
    first, *rest = words or ["--help"]
    is_group = any(verb.startswith(f"{first} ") for verb in TABLE)
    asked_for = rest[:1] if is_group else [first]
    if not asked_for or asked_for[0] in ("-h", "--help"):
        print(_help(prefix=first if is_group else ""), end="")
        return 0
    asked = " ".join(words[: 1 + is_group])
    near = get_close_matches(asked, TABLE, n=1) or [verb for verb in TABLE if asked_for[0] in verb.split()]
    hint = f"did you mean '{near[0]}'?" if near else f"verbs are: {', '.join(TABLE)}"
    print(f"controlbooth: there is no verb '{asked}'; {hint}", file=sys.stderr)
    return USER_ERROR


def _help(prefix: str) -> str:
    lines = ["usage: controlbooth VERB ...    (controlbooth VERB --help explains one; --version)", ""]
    width = max(map(len, TABLE))
    for group, verbs in VERBS.items():
        shown = {verb: text for verb, (_, text) in verbs.items() if verb.startswith(prefix)}
        if shown:
            lines += [f"{group}:", *(f"  {verb:<{width}}  {text}" for verb, text in shown.items()), ""]
    examples = [f"  controlbooth {line}" for line in EXAMPLES[prefix]]
    return "\n".join([*lines, "Examples:", *examples]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
