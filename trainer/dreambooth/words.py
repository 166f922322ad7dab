"""What a base's tokenizers make of the words of subjects: identifiers that are split, cut or taken for another's.

Importing this file is cheap, as the launcher does; its functions import transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from controlbooth.models.recognition import recognise
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.subjects import SubjectRunConfig, fill
from controlbooth.trainer.dreambooth.manifest import Task

BEGINS_A_WORD = "▁"
"""In vocabularies of SentencePiece, of which T5's is one; of CLIP's, </w> ends one."""
MOST_PIECES = 3
"""Of an identifier in T5's vocabulary: the paper finds that sequences of 1 to 3 rare tokens work well."""


def pieces_of(tokenizer: Any, word: str) -> list[str]:
    """Returns the tokens of a word, without the one that says no more than that a word begins."""
    return [piece for piece in tokenizer.tokenize(word) if piece != BEGINS_A_WORD]


def is_t5(tokenizer: Any) -> bool:
    return tokenizer.convert_tokens_to_ids(BEGINS_A_WORD) not in (None, tokenizer.unk_token_id)


def tokenizers_of(config: SubjectRunConfig) -> tuple[Any, ...]:
    """Reads the tokenizers of a run's base, of a transformer with the length to which the run cuts T5's prompts."""
    from controlbooth.models.pretrained import load_tokenizers  # takes seconds, and the rest of this file none

    where = base_folder(config.model.base)
    tokenizers = load_tokenizers(where)
    family = recognise(where, config.model.family)
    if not family.is_transformer:
        return tokenizers
    family = family if config.model.t5 else family.without_t5()
    for part, tokenizer in zip(family.text_encoders, tokenizers, strict=False):
        if part.kind == "T5EncoderModel":
            tokenizer.model_max_length = config.model.text_tokens or family.text_tokens
    return tokenizers[: len(family.text_encoders)]


def check_words(tasks: Sequence[Task], config: SubjectRunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Checks how the base reads the subjects' words. Returns, by subject, faults and warnings.

    An identifier must be one token of every tokenizer, of T5's at most MOST_PIECES: of one that is split, each piece
    has a meaning of its own. It must be among the tokens that the tokenizer keeps of the prompt, and no other subject's
    may be the same to the base.
    A class noun that is split so finely that hardly two letters stay together is a word that the base has never read,
    so it has no prior for it.
    """
    tokenizers = tokenizers_of(config)
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
    pieces = pieces_of(tokenizer, task.identifier)
    numbers = tokenizer.convert_tokens_to_ids(pieces)
    if is_t5(tokenizer) and (len(pieces) > MOST_PIECES or tokenizer.unk_token_id in numbers):
        return (
            f"T5's tokenizer reads the identifier {task.identifier!r} as {' '.join(pieces)}; take one that is at most "
            f"{MOST_PIECES} pieces that it knows, as `controlbooth dreambooth identifiers` finds them"
        )
    if len(pieces) != 1 and not is_t5(tokenizer):
        return (
            f"the base's tokenizer splits the identifier {task.identifier!r} into {' '.join(pieces)}; take one "
            "that is a single token, as `controlbooth dreambooth identifiers` finds them"
        )
    (whole,), (kept,) = (tokens_of(tokenizer, [task.instance_prompt], cut) for cut in (False, True))
    if _has(whole, numbers) and not _has(kept, numbers):
        return (
            f"its instance_prompt has {len(whole)} tokens, and the identifier {task.identifier!r} is not among the "
            f"first {len(kept)}, which are all that the base reads: nothing would be learnt under that word. Shorten "
            "the prompt, or put the identifier nearer to its beginning"
        )
    return None


def _has(tokens: Sequence[int], numbers: Sequence[int]) -> bool:
    """Tells whether these numbers stand in a row of tokens, one after another."""
    count = len(numbers)
    return any(list(tokens[first : first + count]) == list(numbers) for first in range(len(tokens) - count + 1))


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
