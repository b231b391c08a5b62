"""Few-step LoRAs of several kinds beside each other, and beside the pipe without any.

    python examples/recipes_side_by_side.py [MODEL RECIPE ...]

Such as: recipes_side_by_side.py stabilityai/stable-diffusion-xl-base-1.0 lcm tcd hyper-4 lightning-4. All that there
are: `lcmlora recipes`. The embedded model has one few-step LoRA: another recipe drives it too here, which a warning
tells. Writes recipes.html.
"""

import sys

import lcmlora


def main(model="pocket", *recipes):
    chosen = recipes or {"lcm": None, "tcd": lcmlora.pocket.LCM_LORA}  # None is the base's own file
    sheet = lcmlora.compare(
        lcmlora.load(model),
        ["a fox on a teal background", "a large owl on a yellow background"],
        base_steps=(4, 25),
        recipes=chosen,
    )
    sheet.to_html("recipes.html")
    for column in sheet.columns:
        print(f"{column}: {sheet.seconds(column):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
