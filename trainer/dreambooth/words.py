"""What a base's tokenizers make of the words of subjects: identifiers that are split, cut or taken for another's.

Importing this file is cheap, as the launcher does; its functions import transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.subjects import SubjectRunConfig, fill
from controlbooth.trainer.dreambooth.manifest import Task


def check_words(tasks: Sequence[Task], config: SubjectRunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Checks how the base reads the subjects' words. Returns, by subject, faults and warnings.

    An identifier must be one token of every tokenizer: of one that is split, each piece has a meaning of its own. It
    must be among the tokens that the tokenizer keeps of the prompt, and no other subject's may be the same to the base.
    A class noun that is split so finely that hardly two letters stay together is a word that the base has never read,
    so it has no prior for it.
    """
    from controlbooth.models.pretrained import load_tokenizers  # takes seconds, and the rest of this file none

    tokenizers = load_tokenizers(base_folder(config.model.base))
    faults: dict[str, str] = {}
    warnings: dict[str, str] = {}
    for task in tasks:
        for tokenizer in tokenizers:
            if fault := _identifier_fault(tokenizer, task):
                faults.setdefault(task.name, fault)
        told = [*_unknown_nouns(tokenizers, task), *_cut_prompts(tokenizers, task, config)]
        if told:
            warnings[task.name] = "; ".join(dict.fromkeys(told))
    return _equal_subjects(tokenizers, tasks) | faults, warnings


def _identifier_fault(tokenizer: Any, task: Task) -> str | None:
    """Returns why nothing would be learnt under a subject's identifier, or None where the base can learn it.

    Returns None also where the instance prompt leaves the identifier out.
    """
    from controlbooth.data.loading.tokens import tokens_of

    if task.identifier not in task.instance_prompt:
        return None
    pieces = tokenizer.tokenize(task.identifier)
    if len(pieces) != 1:
        return (
            f"the base's tokenizer splits the identifier {task.identifier!r} into {' '.join(pieces)}; take one "
            "that is a single token, as `controlbooth dreambooth identifiers` finds them"
        )
    (whole,), (kept,) = (tokens_of(tokenizer, [task.instance_prompt], cut) for cut in (False, True))
    (number,) = tokenizer.convert_tokens_to_ids(pieces)
    if number in whole and number not in kept:
        return (
            f"its instance_prompt has {len(whole)} tokens, and the identifier {task.identifier!r} is not among the "
            f"first {len(kept)}, which are all that the base reads: nothing would be learnt under that word. Shorten "
            "the prompt, or put the identifier nearer to its beginning"
        )
    return None


def _equal_subjects(tokenizers: Sequence[Any], tasks: Sequence[Task]) -> dict[str, str]:
    """Returns by name what is wrong with subjects whose identifiers or prompts differ but are the same to the base."""
    faults: dict[str, str] = {}
    for field in ("identifier", "instance_prompt"):
        by_name = {task.name: str(getattr(task, field)) for task in tasks}
        for name, other, reason in _equal_to_the_base(tokenizers, by_name):
            faults.setdefault(
                name,
                f"its {field} is {_quoted(by_name[name])}, which is the same to the base as "
                f"{_quoted(by_name[other])} of {other}: {reason}. Change one of them",
            )
    return faults


def _equal_to_the_base(tokenizers: Sequence[Any], texts: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yields (name, name of another whose text differs but is the same to the base, why) for each name that has one."""
    from controlbooth.data.loading.tokens import cut_prompts, equal_prompts

    kept = min(tokenizer.model_max_length for tokenizer in tokenizers)
    for one, other in equal_prompts(tokenizers, list(texts.values())):
        cut = cut_prompts(tokenizers, [one, other])
        reason = f"its tokenizer keeps {kept} tokens" if cut else "its tokenizer tells no capitals and no spaces apart"
        ours, theirs = ([name for name, text in texts.items() if text == which] for which in (one, other))
        yield from ((name, theirs[0], reason) for name in ours)
        yield from ((name, ours[0], reason) for name in theirs)


def _unknown_nouns(tokenizers: Sequence[Any], task: Task) -> Iterator[str]:
    for tokenizer in tokenizers:
        for word in task.class_noun.split():
            pieces = tokenizer.tokenize(word)
            if len(pieces) > max(1, len(word) // 2) and task.class_noun in task.instance_prompt:
                yield (
                    f"the base's tokenizer does not know {word!r} of the class noun {task.class_noun!r} "
                    f"({' '.join(pieces)}), so the base draws nothing by that name; a commoner word works better"
                )


def _cut_prompts(tokenizers: Sequence[Any], task: Task, config: SubjectRunConfig) -> Iterator[str]:
    """Yields a line for each prompt of a subject whose end the base does not read."""
    from controlbooth.data.loading.tokens import cut_prompts

    words = dict(identifier=task.identifier, class_noun=task.class_noun)
    drawn = [fill("prompts", prompt, **words) for prompt in config.validation.prompts]
    named = {
        "class_prompt": [task.class_prompt],
        "instance_prompt": [task.instance_prompt],
        "validation.prompts": drawn,
    }
    for field, prompts in named.items():
        for cut in cut_prompts(tokenizers, prompts):
            yield f"its {field} {_quoted(cut.prompt)} has {cut.tokens} tokens, and the base reads the first {cut.kept}"


def _quoted(prompt: str) -> str:
    from controlbooth.data.loading.tokens import shortened

    return repr(shortened(prompt))
