"""Pictures that say what made them, and what is measured of a device."""

import hashlib
import mmap
from decimal import Decimal

import numpy as np
import pytest
import torch
from PIL import Image

from lcmlora import DataError, accelerate, pictures
from lcmlora.devices import PeakMemory, device_of, hardware
from lcmlora.testing import tiny_lora, tiny_pipeline


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))


def test_a_picture_comes_back_pixel_for_pixel_with_its_record(tmp_path, image):
    file = pictures.save(image, tmp_path / "new" / "a.png", {"prompt": "狐 <script>", "seed": 3})
    again, record = pictures.load(file)
    assert record == {"prompt": "狐 <script>", "seed": 3}
    assert again.tobytes() == image.tobytes()
    assert list(file.parent.iterdir()) == [file]


def test_a_picture_that_says_nothing_is_refused(tmp_path, image):
    image.save(tmp_path / "a.png")
    with pytest.raises(DataError, match="does not say what made it"):
        pictures.load(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match="can't be read"):
        pictures.load(tmp_path / "b.png")


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, image):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        pictures.save(image, tmp_path / "file" / "a.png", {})


def test_equal_arguments_have_equal_keys_and_others_have_others(image):
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    half = torch.ones(3, dtype=torch.bfloat16)
    given = [1, 1.5, "a", [1, 2], image, other, half, half.float(), torch.tensor(1.0), np.ones(3), {"a": image}]
    keys = [pictures.key({"x": one}) for one in given]
    assert len(set(keys)) == len(keys)
    assert pictures.key({"x": image.copy(), "y": 2}) == pictures.key({"y": 2, "x": image})
    assert pictures.key({"x": (1, 2)}) == pictures.key({"x": [1, 2]})


def test_numbers_of_numpy_are_what_they_are_and_objects_in_memory_are_told_apart_by_nobody():
    given = [np.int64(1), np.int64(2), np.float32(0.5), np.bool_(True), Decimal("0.1"), Decimal("0.2")]
    assert [pictures.described(one) for one in given[:4]] == [1, 2, 0.5, True]
    assert len({pictures.key({"x": one}) for one in given[:2] + given[4:]}) == 4
    call = {"steps": np.int64(1), "callback": lambda *given: None, "in a list": [object()], "prompt": "a"}
    assert pictures.untold(call) == ["callback", "in a list"]


def test_provenance_names_files_with_their_digests(tmp_path):
    pipe = tiny_pipeline()
    file, style = tiny_lora(pipe, tmp_path / "lcm.safetensors"), tiny_lora(pipe, tmp_path / "ink.safetensors")
    accelerate(pipe, lora=file, styles={"ink": style})
    found = pictures.provenance(pipe)
    assert found["status"]["styles"] == {"ink": 0.8}
    digests = {one["file"]: one["sha256"] for one in found["loras"].values()}
    assert digests == {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in (file, style)}


def test_the_processors_peak_memory_follows_what_was_allocated():
    peak = PeakMemory(torch.device("cpu"))
    before = peak.bytes()
    if before is None:
        pytest.skip("this system has no such figure")
    with mmap.mmap(-1, 120_000_000) as block:  # of its own: the heap may have room left
        block[:] = bytes(len(block))
    assert peak.bytes() - before > 100e6
    assert PeakMemory(torch.device("cpu")).bytes() - before < 100e6


def test_the_hardware_line_names_device_and_threads():
    assert f"{torch.get_num_threads()} threads" in hardware(device_of(tiny_pipeline()))


def test_provenance_tells_another_fine_tune_and_not_another_memory_format():
    pipe = tiny_pipeline()
    before = pictures.provenance(pipe)["weights"]
    pipe.unet.to(memory_format=torch.channels_last)
    assert pictures.provenance(pipe)["weights"] == before
    pipe.unet.conv_in.weight.data.add_(1e-3)
    assert pictures.provenance(pipe)["weights"] != before
