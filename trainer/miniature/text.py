"""Builds the built-in base's tokenizer and trains its text encoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from controlbooth.data.scenes.render import CLASSES, COLOURS, SIZES, Scene, scene
from controlbooth.models.files.weights import save_pretrained
from controlbooth.trainer.evaluation.scenes.judge import ATTRIBUTES, NONE, facts, split
from controlbooth.trainer.miniature.training import Clock, set_learning_rate

CAPTION_TOKENS = 24


OTHER_WORDS = (
    "photo picture image painting drawing sketch of the in with at to under over near behind striped dotted "
    "spotted wooden metal glass paper toy plate table garden beach snow city forest street night day front "
    "left right top bottom one two big tiny huge shiny old new dark bright colour color thing object animal "
    "plush clock cup cat dog bear boot can bowl"
).split()


def rare_words(count: int = 48) -> list[str]:
    """Returns words of three consonants each, which no word of the captions holds: names for subjects that the base
    knows nothing of."""
    consonants = "bcdfghjklmnpqrstvwxz"
    draw = np.random.default_rng(7)
    words: dict[str, None] = {"sks": None}
    while len(words) < count:
        words["".join(consonants[i] for i in draw.choice(len(consonants), 3, replace=False))] = None
    return list(words)


def build_tokenizer() -> Any:
    """Builds a tokenizer with a byte-pair vocabulary, as CLIP's, in which each word of the captions is one token.

    The merges are learned from the words rather than listed: a hand-written list lets the merges of one word split
    another ("r a" of "rabbit" takes "orange" apart).
    """
    caption_words = ["a", "and", "on", "background", *SIZES, *COLOURS, *CLASSES]
    corpus = {word: 1000 for word in caption_words} | {word: 50 for word in OTHER_WORDS} | {w: 5 for w in rare_words()}
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = WhitespaceSplit()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator([" ".join([word] * times) for word, times in corpus.items()], trainer)
    merges: Any = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_TOKENS)
    for word in corpus:
        pieces = tokenizer.tokenize(word)
        if len(pieces) != 1:
            raise AssertionError(f"{word!r} became {pieces}")
    return tokenizer


def vary(what: Scene, draw: np.random.Generator) -> tuple[str, list[int]]:
    """Draws a caption of the scene, which in part of the cases leaves something out, and returns it with the facts that
    it states (the others are NONE)."""
    with_sizes, with_background, with_photo = draw.random() < 0.8, draw.random() < 0.9, draw.random() < 0.15
    named = [
        f"a {t.size} {t.colour} {t.class_name}" if with_sizes else f"a {t.colour} {t.class_name}" for t in what.objects
    ]
    text = " and ".join(named)
    stated = facts(what)
    names = list(ATTRIBUTES)
    if not with_sizes:
        for which in ("left_size", "right_size"):
            stated[names.index(which)] = ATTRIBUTES[which].index(NONE)
    if with_background:
        text += f" on a {' and '.join(what.background)} background"
    else:
        for which in ("background", "lower_background"):
            stated[names.index(which)] = ATTRIBUTES[which].index(NONE)
    return ("a photo of " + text if with_photo else text), stated


def draw_captions(rows: np.ndarray, draw: np.random.Generator) -> list[str]:
    """Draws a caption for each of the training scenes with these numbers; a tenth are empty, for guidance."""
    return ["" if draw.random() < 0.1 else vary(scene(0, int(row)), draw)[0] for row in rows]


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_text(work: Path, minutes: float) -> None:
    """Teaches the text encoder what captions say: every attribute is read from its hidden states by a linear layer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    readout = nn.Linear(2 * 128, sum(map(len, ATTRIBUTES.values())))
    parameters = [*text_encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    draw = np.random.default_rng(0)
    clock, step = Clock(minutes), 0
    while clock.share < 1.0:
        varied = [vary(scene(2, int(i)), draw) for i in draw.integers(0, 2**40, size=128)]
        truth = torch.tensor([stated for _, stated in varied])
        hidden = text_encoder(tokens(tokenizer, [text for text, _ in varied])).last_hidden_state  # (B, L, 128)
        set_learning_rate(optimizer, 1e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - clock.share) + 0.01))
        logits = split(readout(torch.cat([hidden.mean(dim=1), hidden[:, -1]], dim=1)))
        loss = torch.stack([F.cross_entropy(one, truth[:, i]) for i, one in enumerate(logits)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if clock.due():
            right = torch.stack([one.argmax(dim=1) == truth[:, i] for i, one in enumerate(logits)]).float().mean()
            print(f"text step {step} loss {loss.item():.4f} right {right.item():.4f}", flush=True)
    save_pretrained(text_encoder, work / "text_encoder")
