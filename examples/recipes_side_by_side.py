"""Few-step LoRAs of several kinds beside each other, and beside the pipe without any.

    python examples/recipes_side_by_side.py [MODEL RECIPE ...]

Such as: recipes_side_by_side.py stabilityai/stable-diffusion-xl-base-1.0 lcm tcd hyper-4 lightning-4. All that there
are: `lcmlora recipes`. The embedded model's few-step LoRA serves lcm and tcd alike. Writes recipes.html.
"""

import sys

import lcmlora


def main(model="pocket", *recipes):
    sheet = lcmlora.compare(
        lcmlora.load(model),
        ["a fox on a teal background", "a large owl on a yellow background"],
        base_steps=(4, 25),
        recipes=recipes or ("lcm", "tcd"),
    )
    sheet.to_html("recipes.html")
    for column in sheet.columns:
        print(f"{column}: {sheet.seconds(column):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
