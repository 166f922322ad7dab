"""What tokenizers leave of prompts: which are cut at their length, and which become equal by it.

A tokenizer of this kind keeps so many tokens of a prompt, first and last mark included, and drops the rest in silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cut:
    """A prompt of which a tokenizer drops the end."""

    prompt: str
    tokens: int
    """How many it has, with the marks at its ends."""
    kept: int
    """How many the tokenizer keeps."""


def tokens_of(tokenizer: Any, prompts: Sequence[str], cut: bool) -> list[list[int]]:
    """Returns the token ids of each prompt with begin and end tokens; with `cut` only those that the base reads."""
    if not prompts:
        return []
    options: dict[str, Any] = dict(truncation=True, max_length=tokenizer.model_max_length) if cut else {}
    return tokenizer(list(prompts), add_special_tokens=True, verbose=False, **options).input_ids


def cut_prompts(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[Cut]:
    """Finds the prompts, each once, of which some tokenizer drops the end.

    The numbers are those of the tokenizer that keeps least.
    """
    different = list(dict.fromkeys(prompts))
    found: dict[str, Cut] = {}
    for tokenizer in sorted(tokenizers, key=lambda one: one.model_max_length):
        kept = tokenizer.model_max_length
        for prompt, tokens in zip(different, tokens_of(tokenizer, different, cut=False), strict=True):
            if len(tokens) > kept:
                found.setdefault(prompt, Cut(prompt, len(tokens), kept))
    return [found[prompt] for prompt in different if prompt in found]


def describe_cut(tokenizers: Sequence[Any], prompts: Sequence[str], what: str) -> str | None:
    """Says how many of `prompts` are cut, and names the first; returns None where none is. what: such as "captions"."""
    cut = cut_prompts(tokenizers, prompts)
    if not cut:
        return None
    first, count = cut[0], sum(prompt in {one.prompt for one in cut} for prompt in prompts)
    return (
        f"{count} of {len(prompts)} {what} are longer than the base reads and are cut, such as "
        f"{shortened(first.prompt)!r}: it has {first.tokens} tokens, and the tokenizer keeps {first.kept}"
    )


def equal_prompts(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Finds pairs of different prompts that are the same to the base.

    They are the same because of the cut, or because its tokenizers do not tell some letters apart, such as capital and
    small ones.
    """
    different = list(dict.fromkeys(prompts))
    read = [tokens_of(tokenizer, different, cut=True) for tokenizer in tokenizers]
    first: dict[tuple, str] = {}
    pairs = []
    for row, prompt in enumerate(different):
        key = tuple(tuple(tokens[row]) for tokens in read)
        if key in first:
            pairs.append((first[key], prompt))
        first.setdefault(key, prompt)
    return pairs


def shortened(prompt: str, width: int = 60) -> str:
    return prompt if len(prompt) <= width else f"{prompt[: width - 1]}…"
