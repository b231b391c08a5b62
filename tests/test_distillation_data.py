"""What a distillation learns from: every form it comes in, what training sees of it, and in which order."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import lcmlora
from lcmlora.distillation.data import Example, Pictures, ResumableBatchSampler, bucket_sizes, collate, read

TEXTS = ["a red fox", "two owls, one asleep"]


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def as_png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two pictures, 0.png and 1.png, and nothing that says what they are."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    return folder


def write_lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def write_table(file, rows):
    with file.open("w", newline="") as opened:
        table = csv.DictWriter(opened, rows[0])
        table.writeheader()
        table.writerows(rows)
    return file


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def rows(folder, image="file_name", text="text", root=None):
    return [{image: str(root / f"{i}.png") if root else f"{i}.png", text: told} for i, told in enumerate(TEXTS)]


def mappings():
    return [{"image": picture(i), "text": text} for i, text in enumerate(TEXTS)]


def sidecars(folder):
    (folder / "0.txt").write_text(TEXTS[0] + "\n")
    (folder / "1.caption").write_text(TEXTS[1], encoding="utf-8-sig")
    return folder


def shards(folder, kind="txt"):
    say = {"txt": str.encode, "json": lambda text: json.dumps({"caption": text}).encode()}[kind]
    for i, text in enumerate(TEXTS):
        parts = {f"x/00{i}.PNG": as_png(picture(i)), f"x/00{i}.{kind}": say(text), f"x/00{i}.cls": b"7"}
        write_tar(folder / f"{i}.tar", parts)
    for file in folder.glob("*.png"):
        file.unlink()
    return folder


def hf(folder, **columns):
    files = [str(folder / f"{i}.png") for i in range(2)]
    table = datasets.Dataset.from_dict({"image": files, "text": TEXTS, **columns})
    return table.cast_column("image", datasets.Image())


def embedded(folder):
    """A data set that holds its pictures, as one from the hub does."""
    found = [{"image": {"bytes": as_png(picture(i)), "path": None}, "text": text} for i, text in enumerate(TEXTS)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(found, features=features)


def saved(folder):
    datasets.DatasetDict({"test": hf(folder).select([0]), "train": hf(folder)}).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = {
    "metadata.jsonl": lambda f: write_lines(f / "metadata.jsonl", rows(f)).parent,
    "metadata.csv": lambda f: write_table(f / "metadata.csv", rows(f)).parent,
    "metadata, as a string": lambda f: str(write_lines(f / "metadata.jsonl", rows(f)).parent),
    "sidecars": sidecars,
    "a .jsonl": lambda f: write_lines(f / "any.jsonl", rows(f, "path", "caption")),
    "a .csv": lambda f: write_table(f / "any.csv", rows(f)),
    "absolute paths": lambda f: write_lines(f.parent / "a.jsonl", rows(f, "image", root=f)),
    "shards": shards,
    "shards with json": lambda f: shards(f, "json"),
    "pairs of paths": lambda f: [(f / f"{i}.png", text) for i, text in enumerate(TEXTS)],
    "pairs of pictures": lambda f: ((picture(i), text) for i, text in enumerate(TEXTS)),
    "mappings": lambda f: mappings(),
    "datasets": hf,
    "datasets with the bytes": embedded,
    "datasets of paths": lambda f: datasets.Dataset.from_list(rows(f, root=f)),
    "datasets, saved": saved,
    "datasets, streamed": lambda f: hf(f).to_iterable_dataset(),
    "datasets, streamed bytes": lambda f: embedded(f).to_iterable_dataset(),
    "datasets, streamed and unknown": lambda f: datasets.IterableDataset.from_generator(lambda: iter(mappings())),
}


@pytest.mark.parametrize("form", SOURCES)
def test_pictures_with_texts_are_read_in_every_form(form, folder):
    found = read(SOURCES[form](folder))
    assert (found.pictures, found.skipped) == (True, ())
    assert [one.text for one in found.examples] == TEXTS
    for i, one in enumerate(found.examples):
        assert one.size == (20, 24)
        assert np.array_equal(np.asarray(one.open()), np.asarray(picture(i)))


PROMPTS = {
    "a .txt": lambda f: (f / "p.txt", (f / "p.txt").write_text("\n".join([TEXTS[0], "", f"  {TEXTS[1]} "])))[0],
    "a .jsonl": lambda f: write_lines(f / "p.jsonl", [{"prompt": text} for text in TEXTS]),
    "a .csv": lambda f: write_table(f / "p.csv", [{"text": text} for text in TEXTS]),
    "a list": lambda f: TEXTS,
    "mappings": lambda f: ({"text": text} for text in TEXTS),
    "datasets": lambda f: datasets.Dataset.from_dict({"prompt": TEXTS}),
}


@pytest.mark.parametrize("form", PROMPTS)
def test_prompts_alone_are_read(form, folder):
    found = read(PROMPTS[form](folder))
    assert found.examples == (Example(TEXTS[0]), Example(TEXTS[1]))
    assert not found.pictures


@pytest.mark.parametrize(("name", "separator"), [("p.csv", ";"), ("p.csv", ","), ("p.tsv", "\t")])
def test_a_spreadsheets_table_is_read_as_it_writes_it(name, separator, folder):
    """With the separator of its language, a mark in front, and rows of empty cells at the end."""
    lines = [("text", "file_name"), ("a fox", "0.png"), ('"two, or three; owls\t"', "1.png"), ("", ""), ("", "")]
    (folder / name).write_text("\ufeff" + "".join(separator.join(cells) + "\r\n" for cells in lines), newline="")
    found = read(folder / name)
    assert [one.text for one in found.examples] == ["a fox", "two, or three; owls\t"]
    assert found.pictures


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_text_may_hold_any_character(name, folder):
    text = 'ein "Fuchs", \u2028 rot\x0b\x85 und\nzwei'
    if name.endswith("csv"):
        write_table(folder / name, [{"file_name": "0.png", "text": text}])
    else:
        line = json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False)
        (folder / name).write_text(line + "\r\n", encoding="utf-8", newline="")
    assert [one.text for one in read(folder).examples] == [text]


def test_columns_may_have_any_name(folder):
    table = hf(folder, de=["ein Fuchs", "zwei Eulen"]).rename_column("image", "Bild")
    found = read(table, text_column="de", image_column="Bild")
    assert [one.text for one in found.examples] == ["ein Fuchs", "zwei Eulen"]
    with pytest.raises(lcmlora.DataError, match="no image_column='bild', but 'Bild', 'text', 'de'"):
        read(table, image_column="bild")


# -- broken pictures --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder):
    """A picture that is not there, one that is cut off, and a good one."""
    whole = as_png(picture(1))
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    write_lines(folder / "metadata.jsonl", [*rows(folder), {"file_name": "2.png", "text": "three"}])
    return folder


def test_broken_pictures_are_left_out_with_one_warning(broken):
    with pytest.warns(
        lcmlora.LcmLoraWarning, match=r"2 of 3 pictures can't be used and are left out: .*1\.png"
    ) as told:
        found = read(broken)
    assert len(told) == 1
    assert [one.text for one in found.examples] == TEXTS[:1]
    assert [what for what, _ in found.skipped] == [str(broken / "1.png"), str(broken / "2.png")]
    assert [why for _, why in found.skipped][1] == "it is not there"


def test_broken_pictures_are_refused_where_strict(broken):
    with pytest.raises(
        lcmlora.DataError, match=r"2 of 3 pictures can't be used: .*1\.png.*2\.png \(it is not there\)"
    ):
        read(broken, strict=True)


@pytest.mark.filterwarnings("ignore::lcmlora.errors.LcmLoraWarning")
@pytest.mark.parametrize("form", ["a tar", "datasets", "datasets, streamed", "sidecars", "pairs"])
def test_a_bad_picture_is_left_out_in_every_form(form, folder):
    bad = b"not a picture"
    (folder / "2.png").write_bytes(bad)
    (folder / "2.txt").write_text("three")
    good = {"0.png": as_png(picture()), "0.txt": b"one", "1.txt": b"no picture", "2.png": bad, "2.txt": b"three"}
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": b, "path": None} if b else None, "text": "x"} for b in (bad, None, as_png(picture()))],
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    sources = {
        "a tar": lambda: write_tar(folder / "a.tar", good),
        "datasets": lambda: table,
        "datasets, streamed": lambda: table.to_iterable_dataset(),
        "sidecars": lambda: sidecars(folder) if (folder / "1.png").rename(folder / "9.png") else None,
        "pairs": lambda: [(folder / "2.png", "x"), ("", "y"), (picture(), "z")],
    }
    found = read(sources[form]())
    assert (len(found.examples), len(found.skipped)) == (1, 2)


# -- refusals ---------------------------------------------------------------------------------------------------------


def line(name, text):
    def write(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / name if name.startswith("any") else folder

    return write


REFUSED = {
    "nothing there": (lambda f: f / "no", "no is not there"),
    "a repository": (lambda f: "lambdalabs/naruto", r"load_dataset\('lambdalabs/naruto', split='train'\)"),
    "another file": (line("any.parquet", "x"), "any.parquet: a folder, or a file that ends in .jsonl, .csv"),
    "no texts": (lambda f: f, "2 pictures and no texts; write a metadata.jsonl"),
    "an empty table": (line("metadata.jsonl", "\n"), "holds no picture and no prompt"),
    "an empty list": (lambda f: [], "holds no picture and no prompt"),
    "no json": (line("metadata.jsonl", "{"), "line 1 of metadata.jsonl is no JSON"),
    "no row": (line("metadata.jsonl", "[1]"), r"line 1: .* is expected, got \[1\]"),
    "no text column": (
        line("metadata.jsonl", '{"file_name": "0.png"}'),
        r"line 1: a 'text' is expected, .*'file_name'",
    ),
    "no text": (line("metadata.jsonl", '{"file_name": "0.png", "text": 3}'), "line 1: a text is expected, got 3"),
    "a picture of a kind": (line("any.jsonl", '{"image": [1], "text": "x"}'), "line 1: a path or a PIL image"),
    "a picture that is none": (
        line("metadata.jsonl", '{"file_name": "9.png", "text": "x"}'),
        "9.png .it is not there",
    ),
    "a short row": (line("metadata.csv", "file_name,text\n0.png\n"), "metadata.csv, line 2: 2 cells are expected"),
    "a long row": (
        line("metadata.csv", "file_name,text\n0.png,a,b\n"),
        "line 2 of metadata.csv: there are more cells",
    ),
    "not in UTF-8": (line("any.txt", b"\xff\xfe\x00"), "any.txt is no text in UTF-8"),
    "paths for prompts": (lambda f: [str(f / "0.png")], "pictures without texts"),
    "a mixture": (lambda f: [(picture(), "a"), "a fox"], "mixes prompts without a picture, such as 'a fox'"),
    "a triple": (lambda f: [(1, 2, 3)], "item 0: .picture, text., a mapping or a prompt is expected"),
    "the wrong way round": (lambda f: [("a fox", picture())], "item 0: a text is expected, got"),
    "a number": (lambda f: 5, "5 is no data"),
    "one mapping": (lambda f: {"image": "0.png", "text": "x"}, "is no data"),
    "no tar": (line("any.tar", b"x" * 600), "any.tar can't be read as an uncompressed tar file"),
    "bad json in a tar": (lambda f: write_tar(f / "a.tar", {"a.png": b"", "a.json": b"{"}), r"a.tar: a.json: "),
    "no text in a tar": (lambda f: write_tar(f / "a.tar", {"a.png": b"", "a.json": b"3"}), "a.tar: a"),
    "a broken data set": (line("state.json", "{}"), "can't be read as a saved data set"),
    "splits": (lambda f: datasets.DatasetDict(a=hf(f), b=hf(f)), "the splits 'a', 'b': pass one of them"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_data_is_refused_in_a_sentence(what, folder):
    make, words = REFUSED[what]
    with pytest.raises(lcmlora.DataError, match=words) as refused:
        read(make(folder))
    assert "\n" not in str(refused.value)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_turned_upright(tmp_path):
    image = picture(size=(24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    image.save(tmp_path / "a.png", exif=exif)
    (one,) = read([(tmp_path / "a.png", "x")]).examples
    assert one.size == (24, 16)
    assert np.array_equal(np.asarray(one.open()), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.info["transparency"] = 0
    else:
        image = image.convert(mode)
    assert Example("x", image).open().getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_to_eight():
    image = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
    assert Example("x", image).open().getpixel((0, 0)) == (128, 128, 128)


def look(examples, turn=0, resolution=16, seed=0, flip=False, **options):
    return Pictures(examples, resolution, flip, seed, **options)[(0, turn)]


def gradient(width, height):
    """A picture whose red is its column and whose green is its row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def test_a_row_says_where_its_crop_was():
    example = Example("x", gradient(40, 16))
    tops = set()
    for turn in range(8):
        row = look([example], turn)
        top, left = row["crop_top_left"]
        assert row["original_size"] == (16, 40)
        assert (row["text"], row["index"], row["turn"], top) == ("x", 0, turn, 0)
        assert torch.equal(row["pixels"][0, 0], (torch.arange(16.0) + left) / 127.5 - 1)
        tops.add(left)
    assert len(tops) > 3
    assert look([example], center_crop=True)["crop_top_left"] == (0, 12)


def test_a_mirrored_row_says_where_its_crop_was():
    example = Example("x", gradient(40, 16))
    rows = [look([example], turn, flip=True) for turn in range(20)]
    mirrored = [row for row in rows if row["pixels"][0, 0, 0] > row["pixels"][0, 0, 1]]
    assert 4 < len(mirrored) < 16
    for row in mirrored:  # column c of the mirrored picture is column 39 - c of the picture
        left = row["crop_top_left"][1]
        assert torch.equal(row["pixels"][0, 0], (39 - left - torch.arange(16.0)) / 127.5 - 1)


def test_what_is_random_comes_from_seed_index_and_turn():
    examples = [Example("x", picture(size=(60, 16)))] * 2
    crops = [look(examples, turn, seed=seed, flip=True) for seed in (0, 1) for turn in (0, 1)]
    again = [look(examples, turn, seed=seed, flip=True) for seed in (0, 1) for turn in (0, 1)]
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(crops, again, strict=True))
    assert len({row["crop_top_left"] for row in crops}) > 2


def test_a_picture_that_vanishes_is_named(folder):
    found = read([(folder / "0.png", "x")])
    (folder / "0.png").unlink()
    with pytest.raises(lcmlora.DataError, match=r"0\.png can't be read as a picture: it is not there"):
        look(found.examples)


# -- buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (768, 64), (512, 64), (256, 32), (64, 8), (16, 8)])
def test_buckets_have_about_as_many_pixels(resolution, step):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert all(h % step == w % step == 0 for h, w in sizes)
    assert all(resolution / 2 <= side <= 2 * resolution for size in sizes for side in size) or resolution == 16
    assert all(h * w <= resolution**2 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    if resolution >= 512:
        assert min(h * w for h, w in sizes) > 0.75 * resolution**2
        assert {(512, 512), (640, 384), (384, 640)} <= set(bucket_sizes(512))


def test_a_picture_goes_to_the_bucket_of_its_shape():
    shapes = {(600, 600): (512, 512), (1600, 900): (384, 640), (900, 1600): (640, 384), (4000, 100): (256, 1024)}
    examples = [Example("x", picture(size=size)) for size in shapes]
    pictures = Pictures(examples, 512, False, 0, buckets=bucket_sizes(512))
    assert [pictures.size(i) for i in range(4)] == list(shapes.values())
    for i, (height, width) in enumerate(shapes.values()):
        row = pictures[(i, 0)]
        assert row["pixels"].shape == (3, height, width)
        assert row["original_size"] == examples[i].picture.size[::-1]


def test_a_batch_holds_one_bucket(folder):
    examples = [Example(str(i), picture(i, size)) for i, size in enumerate([(20, 20), (40, 16), (22, 20), (16, 40)])]
    pictures = Pictures(examples, 16, False, 0, buckets=bucket_sizes(16))
    order = ResumableBatchSampler(4, 3, 0, 0, 8, buckets=pictures.buckets_of)
    batches = list(DataLoader(pictures, batch_sampler=order, collate_fn=collate))
    assert {tuple(batch["pixels"].shape) for batch in batches} == {(3, 3, 16, 16), (3, 3, 8, 24), (3, 3, 24, 8)}
    assert [batch["turn"] for batch in batches] == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]


# -- order ------------------------------------------------------------------------------------------------------------

BUCKETS = {"one bucket": None, "three buckets": [0, 0, 1, 1, 1, 1, 1, 0, 2, 1]}


def stream(batch, processes=1, first=0, last=24, seed=1, buckets=None):
    """What all processes see together, step by step."""
    each = [ResumableBatchSampler(10, batch, seed, first, last, p, processes, buckets) for p in range(processes)]
    assert len(each[0]) == last - first
    return [[row for part in step for row in part] for step in zip(*each, strict=True)]


@pytest.mark.parametrize("buckets", BUCKETS.values(), ids=BUCKETS)
def test_two_processes_see_what_one_sees(buckets):
    assert stream(2, 3, buckets=buckets) == stream(6, 1, buckets=buckets)


@pytest.mark.parametrize("buckets", BUCKETS.values(), ids=BUCKETS)
def test_a_run_goes_on_in_the_middle_of_an_epoch(buckets):
    whole = stream(3, buckets=buckets)
    assert stream(3, first=7, buckets=buckets) == whole[7:]
    assert stream(3, last=9, buckets=buckets) == whole[:9]
    assert [turn for step in whole for _, turn in step] == list(range(72))


@pytest.mark.parametrize("buckets", BUCKETS.values(), ids=BUCKETS)
def test_every_example_is_seen_as_often_as_any_other(buckets):
    seen = Counter(index for step in stream(2, 2, last=250, buckets=buckets) for index, _ in step)
    assert set(seen) == set(range(10))
    assert all(90 <= count <= 110 for count in seen.values())


def test_every_epoch_has_all_examples_in_an_order_of_its_own():
    seen = [index for step in stream(2, 2, last=10) for index, _ in step]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen != [index for step in stream(2, 2, last=10, seed=2) for index, _ in step]


def test_accumulating_sees_what_a_larger_batch_sees():
    small = [row for step in stream(2, last=12) for row in step]
    assert small == [row for step in stream(4, last=6) for row in step]


def test_workers_can_have_every_kind_of_picture(folder):
    for one in (read(make(folder)) for make in (hf, embedded, shards)):
        assert pickle.loads(pickle.dumps(one)).examples[0].open().size == (24, 20)
