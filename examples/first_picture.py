"""A picture in four steps, and the pipe given back as it was.

    python examples/first_picture.py [MODEL [PROMPT]]

MODEL is a folder, a repository such as stabilityai/stable-diffusion-xl-base-1.0, or a .safetensors checkpoint. Without
one it is the small model inside the package. Writes first.png.
"""

import sys

import torch

import lcmlora


def main(model="pocket", prompt="a fox on a teal background"):
    pipe = lcmlora.load(model)  # on the GPU, where there is one
    lcmlora.accelerate(pipe)  # finds the base, gets its LCM-LoRA and merges it
    image = pipe(prompt, generator=torch.Generator().manual_seed(1)).images[0]  # 4 steps, guidance 1
    image.save("first.png")
    print(lcmlora.status(pipe))
    lcmlora.restore(pipe)  # bit for bit what it was


if __name__ == "__main__":
    main(*sys.argv[1:])
