"""A fine-tune in four steps, by its base's LCM-LoRA, beside two style LoRAs at several weights.

    python examples/fine_tune_and_two_styles.py [MODEL ONE.safetensors TWO.safetensors]

Without arguments it is the embedded model's fine-tune, which draws with chalk, and the embedded style. That style at a
smaller rank stands in for a second one. Writes styles-....png.
"""

import sys

import torch

import lcmlora


def main(model="pocket:chalk", one=lcmlora.pocket.STYLE, two=None):
    two = two or lcmlora.resize_lora(one, 4, "two.safetensors").file
    pipe = lcmlora.accelerate(lcmlora.load(model), styles={"one": one, "two": lcmlora.Style(two, weight=0.4)})
    for weights in ({}, {"one": 0.8}, {"two": 0.8}, {"one": 0.4, "two": 0.4}):
        lcmlora.set_styles(pipe, weights)  # computed anew from the originals: no drift, however often
        image = pipe("a fox on a teal background", generator=torch.Generator().manual_seed(1)).images[0]
        image.save("-".join(["styles", *(f"{name}{weight}" for name, weight in weights.items())]) + ".png")


if __name__ == "__main__":
    main(*sys.argv[1:])
