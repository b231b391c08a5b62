"""Make a model its own LCM-LoRA, from a folder of pictures with captions.

    pip install 'lcmlora[train]'
    python examples/distil_from_folder.py [MODEL FOLDER STEPS]

FOLDER has a.png beside a.txt, or a metadata.jsonl. Without one the model draws pictures to learn from. 1000 steps are
usual; the 20 here only show how. The LoRA, its card and report.html are in my-lcm-lora/.
"""

import sys

import torch

import lcmlora

PROMPTS = [f"a {thing} on a {colour} background" for thing in ("fox", "owl") for colour in ("teal", "pink")]


def drawn(pipe):
    made = lcmlora.generate(pipe, PROMPTS, "pictures", call={"steps": 12, "guidance": 2.5})
    for file, prompt in zip(made.files, PROMPTS, strict=True):
        file.with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return "pictures"


def main(model="pocket", folder=None, steps="20"):
    pipe = lcmlora.load(model)
    config = lcmlora.DistillConfig(steps=int(steps), rank=8, batch_size=4, learning_rate=1e-3, w=1.5)
    file = lcmlora.distill(pipe, folder or drawn(pipe), "my-lcm-lora", config)  # the pipe is given back as it was
    lcmlora.accelerate(pipe, lora=file)
    pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1)).images[0].save("distilled.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
