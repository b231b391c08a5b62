"""The pictures the pocket model learns from: drawings of named things, placed on named backgrounds.

Two npm packages hold the drawings, both freely licensed (see `LICENSES` in the model's folder):

* `@iconify-json/noto` (Apache-2.0): vector drawings, what the base model learns;
* `@lobehub/fluent-emoji-3d` (MIT): soft 3-D renders of the same things, the second look of the style LoRA.

A third look, chalk on a dark board, is computed from the first and is what the fine-tuned UNet learns.

`python pictures.py --data DIR` fetches both with `npm pack` and renders one transparent sprite per thing and look to
`DIR/sprites.npz`. `compose` then puts a sprite on a background, and `caption` says in words what it did; every picture
of every training script comes out of these two functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

PACKAGES = {"noto": "@iconify-json/noto@1.2.9", "fluent": "@lobehub/fluent-emoji-3d@1.1.0"}
# What the whole model hangs on
SIZE = 128  # side of a picture, pixels
FACTOR = 8  # pixels to a latent's side
CHANNELS = 16  # of a latent
SPRITE = 128  # side of a rendered sprite, pixels

# key in the Noto set -> the words a prompt uses, where they differ from the key with spaces for dashes
THINGS = {
    key: name.strip() or key.replace("-", " ")
    for key, _, name in (
        item.partition(":")
        for item in """
        fox cat-face:cat dog-face:dog panda tiger-face:tiger lion bear koala frog monkey-face:monkey chicken penguin
        duck owl eagle parrot flamingo swan peacock turtle snake lizard crocodile dolphin whale fish tropical-fish
        blowfish shark octopus crab lobster shrimp squid snail butterfly honeybee:bee lady-beetle:ladybug ant elephant
        giraffe zebra gorilla cow-face:cow pig-face:pig rabbit-face:rabbit mouse-face:mouse hamster unicorn
        horse-face:horse ewe:sheep goat deer moose wolf bat hedgehog rooster baby-chick:chick t-rex:dinosaur
        dragon-face:dragon beaver cactus sunflower rose tulip hibiscus evergreen-tree:pine_tree palm-tree
        four-leaf-clover:clover maple-leaf mushroom seedling red-apple green-apple banana pear tangerine:orange lemon
        watermelon grapes strawberry cherries peach mango pineapple coconut kiwi-fruit:kiwi tomato avocado eggplant
        broccoli carrot ear-of-corn:corn hot-pepper:chili bread croissant pretzel pancakes cheese-wedge:cheese
        hamburger french-fries:fries pizza hot-dog sandwich taco doughnut cookie birthday-cake:cake cupcake ice-cream
        lollipop candy popcorn hot-beverage:cup_of_coffee teapot beer-mug:mug_of_beer egg balloon soccer-ball:football
        basketball guitar violin trumpet drum camera television telephone light-bulb candle books key hammer scissors
        umbrella backpack crown top-hat glasses ring gem-stone:diamond bell alarm-clock hourglass-done:hourglass rocket
        airplane helicopter sailboat automobile:car bus bicycle locomotive:train tractor house castle tent snowman sun
        crescent-moon:moon star rainbow cloud fire snowflake ghost robot alien skull jack-o-lantern:pumpkin
        red-heart:heart teddy-bear wrapped-gift:gift trophy anchor game-die:dice chair bed bathtub jeans dress t-shirt
        socks gloves pencil paintbrush microscope telescope magnet bucket basket shield
        """.split()
    )
}
THINGS = {key: name.replace("_", " ") for key, name in THINGS.items()}

# The things that the pocket model knows. All THINGS make its tokenizer, its VAE and the first steps of its training,
# so that it starts from varied pictures; a model this small, trained for an hour, then learns half of them well.
TAUGHT = tuple(
    """
    fox cat-face dog-face panda tiger-face lion frog pig-face owl penguin tropical-fish octopus crab butterfly honeybee
    lady-beetle turtle whale elephant rabbit-face mouse-face baby-chick snail
    cactus sunflower rose tulip evergreen-tree palm-tree four-leaf-clover mushroom
    red-apple banana pear tangerine lemon watermelon grapes strawberry cherries pineapple tomato avocado eggplant
    carrot ear-of-corn pizza hamburger doughnut birthday-cake ice-cream french-fries hot-dog cookie balloon soccer-ball
    basketball guitar drum camera light-bulb key umbrella crown gem-stone alarm-clock rocket airplane sailboat
    automobile bus house snowman sun crescent-moon star red-heart ghost robot skull jack-o-lantern wrapped-gift
    """.split()
)

BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (24, 24, 28),
    "grey": (140, 144, 150),
    "red": (200, 40, 48),
    "orange": (244, 140, 40),
    "yellow": (250, 214, 70),
    "green": (56, 150, 70),
    "teal": (20, 140, 140),
    "blue": (50, 100, 210),
    "purple": (120, 70, 180),
    "pink": (246, 160, 196),
    "brown": (120, 78, 50),
}
SIZES = {"small": 0.46, "": 0.70, "large": 0.94}  # share of the picture's side that the sprite takes
POSITIONS = {
    "": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one picture shows. `thing`, `background`, `size` and `position` are keys of the four tables above."""

    thing: str
    background: str
    size: str = ""
    position: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this pairing of thing and background is kept from every training script (one in ten, by hash)."""
        digest = hashlib.sha256(f"{self.thing}/{self.background}".encode()).digest()
        return digest[0] % 10 == 0


def caption(scene: Scene) -> str:
    """The words for a scene, e.g. "a small fox on a teal background, on the left"."""
    words = f"{scene.size} {THINGS[scene.thing]}".strip()
    article = "an" if words[0] in "aeiou" and not words.startswith("uni") else "a"
    place = f", {scene.position}" if scene.position else ""
    ground = "an" if scene.background[0] in "aeiou" else "a"
    return f"{article} {words} on {ground} {scene.background} background{place}"


def draw_scene(rng: random.Random, things: Sequence[str] = TAUGHT) -> Scene:
    """A scene drawn at random. A large thing fills the picture, so it is always in the middle."""
    size = rng.choice(("small", "", "", "large"))
    position = rng.choice(list(POSITIONS)) if size != "large" and rng.random() < 0.6 else ""
    return Scene(rng.choice(things), rng.choice(list(BACKGROUNDS)), size, position)


def training_scenes(count: int, seed: int, things: Sequence[str] = TAUGHT) -> list[Scene]:
    """`count` scenes that are not held out."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(rng, things)
        if not scene.held_out:
            scenes.append(scene)
    return scenes


class Sprites:
    """The rendered things of every look. `look` is "noto", "fluent" or "chalk"."""

    def __init__(self, data: Path) -> None:
        with np.load(data / "sprites.npz") as arrays:
            self.looks: dict[str, dict[str, Image.Image]] = {"noto": {}, "fluent": {}}
            for name in arrays.files:
                look, _, thing = name.partition("/")
                self.looks[look][thing] = Image.fromarray(arrays[name])

    def compose(
        self, scene: Scene, look: str = "noto", rng: random.Random | None = None, size: int = SIZE
    ) -> Image.Image:
        """The picture of a scene, RGB, `size` x `size`. With an `rng`, colour, place and scale vary a little."""
        rng = rng or random.Random(0)
        sprite = self.looks["fluent" if look == "fluent" else "noto"][scene.thing]
        side = round(size * SIZES[scene.size] * rng.uniform(0.96, 1.04))
        side = min(side, size)
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
        room = (size - side) / 2
        dx, dy = POSITIONS[scene.position]
        shift = [room + room * 0.85 * d + rng.uniform(-1, 1) * min(room, size / 32) for d in (dx, dy)]
        left, top = (round(min(max(s, 0), size - side)) for s in shift)
        colour = tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in BACKGROUNDS[scene.background])
        if look == "chalk":
            return _chalk(sprite, (left, top), colour, size)
        picture = Image.new("RGB", (size, size), colour)
        picture.paste(sprite, (left, top), sprite)
        return picture


def _chalk(sprite: Image.Image, corner: tuple[int, int], colour: tuple[int, ...], size: int) -> Image.Image:
    """Pale outlines, half filled with colour, on a dark board that keeps a hint of the background's hue."""
    board = tuple(round(20 + 0.35 * c) for c in colour)
    width = size / 96  # of a stroke, pixels
    flat = Image.new("RGB", sprite.size, (128, 128, 128))
    flat.paste(sprite, (0, 0), sprite)
    pixels = np.asarray(flat.filter(ImageFilter.GaussianBlur(0.6 * width)), dtype=np.float32)
    gradient = sum(np.abs(np.gradient(pixels, axis=axis)).max(-1) for axis in (0, 1))
    alpha = np.asarray(sprite.getchannel("A").filter(ImageFilter.GaussianBlur(0.6 * width)), dtype=np.float32)
    rim = sum(np.abs(np.gradient(alpha, axis=axis)) for axis in (0, 1))
    stroke = np.clip(width * (gradient / 55 + rim / 90), 0, 1) ** 0.8
    tint = 0.5 * 245 + 0.5 * pixels  # chalk with some of the drawing's own colour
    body = np.clip(alpha / 255, 0, 1)[..., None] * 0.5
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = board
    left, top = corner
    part = canvas[top : top + stroke.shape[0], left : left + stroke.shape[1]]
    part += (pixels - part) * body
    part += (tint - part) * stroke[..., None]
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def fetch(data: Path) -> None:
    """Download both npm packages into `data` and unpack them."""
    data.mkdir(parents=True, exist_ok=True)
    for look, package in PACKAGES.items():
        if (data / look).exists():
            continue
        done = subprocess.run(
            ["npm", "pack", "--silent", package, "--pack-destination", str(data)],
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(data / done.stdout.split()[-1]) as archive:
            archive.extractall(data / look, filter="data")


def render(data: Path) -> None:
    """One RGBA sprite per thing and look, into `data/sprites.npz`."""
    import resvg_py

    icons = json.loads((data / "noto/package/icons.json").read_text())
    chars = json.loads((data / "noto/package/chars.json").read_text())  # code point -> key; some keys have two
    assets = data / "fluent/package/assets"
    arrays = {}
    for thing in THINGS:
        width = icons["icons"][thing].get("width", icons.get("width", 128))
        height = icons["icons"][thing].get("height", icons.get("height", 128))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{SPRITE}" height="{SPRITE}">{icons["icons"][thing]["body"]}</svg>'
        )
        sprite = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        arrays[f"noto/{thing}"] = np.asarray(sprite)
        files = (assets / f"{code}{end}.webp" for code, key in chars.items() if key == thing for end in ("", "-fe0f"))
        render_3d = Image.open(next(file for file in files if file.exists())).convert("RGBA")
        arrays[f"fluent/{thing}"] = np.asarray(render_3d.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
    np.savez_compressed(data / "sprites.npz", **arrays)


def write_folder(data: Path, folder: Path, count: int, seed: int = 4) -> None:
    """`count` captioned pictures of the vector drawings, as `lcmlora.distill` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    sprites, rows = Sprites(data), []
    for i, scene in enumerate(training_scenes(count, seed)):
        sprites.compose(scene, "noto", random.Random(i)).save(folder / f"{i:05}.png")
        rows.append(json.dumps({"file_name": f"{i:05}.png", "text": caption(scene)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the downloads and the sprites")
    parser.add_argument("--folder", type=Path, help="also write a folder of captioned pictures for `lcmlora distill`")
    parser.add_argument("--count", type=int, default=6000, help="how many")
    args = parser.parse_args()
    if not (args.data / "sprites.npz").exists():
        fetch(args.data)
        render(args.data)
    if args.folder:
        write_folder(args.data, args.folder, args.count)


if __name__ == "__main__":
    main()
