"""The recipe of the embedded base model: from rendered scenes (data/scenes/render.py) to a folder for diffusers.

    python -m controlbooth.trainer.miniature.recipe STAGE --work FOLDER [--minutes N]

    scenes   draws the pictures that the other stages learn from
    vae      AutoencoderKL, factor 8, 12 latent channels: first on 32-pixel crops, then on whole pictures
    judge    a small network that reads scenes: object classes, colours and sizes from left to right, and backgrounds
    reader   a small network that finds depth, normals, classes and key points in pictures of scenes
    text     a CLIP text encoder, taught to know what a caption says before it sees a picture; frozen afterwards
    unet     v-prediction on cached latents; prompts reach it by cross-attention and, pooled, beside the timestep.
             On two ranks: torchrun --standalone --nproc-per-node 2 -m controlbooth.trainer.miniature.recipe unet --work
             FOLDER
    dit      a second base on the same VAE and text encoder, those of the shipped weights: SD3's transformer, by flow
             matching towards what the shipped U-Net expects. It needs `scenes` alone, and takes a GPU if there is one.
             dit-score   exports it to WORK/dit and has the judge read 128 samples of held-out captions
    export   writes the diffusers folder;   score   samples 128 held-out captions and has the judge read them
    unpack   the reverse of export: fills an empty work folder from the shipped weights, so that `unet` trains them on

`vae`, `unet` and `dit` go on from what they saved. MINUTES of each stage of the shipped weights are in its model card.
"""

import argparse
from pathlib import Path

import torch

from controlbooth.models.pretrained import MINIATURE
from controlbooth.trainer.miniature.card import export, score, unpack
from controlbooth.trainer.miniature.dit import score_dit, train_dit
from controlbooth.trainer.miniature.pictures import draw_scenes
from controlbooth.trainer.miniature.readers import train_judge, train_reader
from controlbooth.trainer.miniature.text import train_text
from controlbooth.trainer.miniature.unet import train_unet
from controlbooth.trainer.miniature.vae import train_vae

STAGES = {"vae": train_vae, "judge": train_judge, "reader": train_reader, "text": train_text}
DENOISERS = {"unet": train_unet, "dit": train_dit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("scenes", *STAGES, *DENOISERS, "dit-score", "export", "score", "unpack"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the training's own files")
    parser.add_argument("--out", type=Path, default=MINIATURE, help="the diffusers folder (default: models/miniature)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the stage trains")
    parser.add_argument("--scenes", type=int, default=64_000, help="how many the stage `scenes` draws")
    parser.add_argument(
        "--final", action="store_true", help="let the learning rate of `unet` or `dit` fall to 2 % (the last run)"
    )
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "scenes":
        draw_scenes(options.work, options.scenes)
    elif options.stage == "export":
        export(options.work, options.out)
    elif options.stage == "score":
        score(options.out)
    elif options.stage == "dit-score":
        score_dit(options.work)
    elif options.stage == "unpack":
        unpack(options.work, options.out)
    elif options.stage in DENOISERS:
        DENOISERS[options.stage](options.work, options.minutes, options.final)
    else:
        STAGES[options.stage](options.work, options.minutes)


if __name__ == "__main__":
    main()
