"""Hundreds of bad LoRA files: each is refused in our own words or harmless, and the pipe is as it was afterwards."""

from __future__ import annotations

import json
import math
import random
import string
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import lcmlora
from conftest import assert_same, sd_pipe, snapshot, tiny_unet, write_lora
from lcmlora.layers import TARGET_MODULES, lcm_layers

Tensors = dict[str, tuple[str, list[int], bytes]]
"""The tensors of a file by key: dtype, shape, bytes."""

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 1, "C64": 8}
SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "X7": 3}
A_KIND = 46
"""Files of each kind; twelve kinds."""


def unpack(content: bytes) -> Tensors:
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {key: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for key, t in header.items()}


def pack(tensors: Tensors, metadata: object = None) -> bytes:
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for key, (dtype, shape, raw) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats(value: float, shape: list[int]) -> tuple[str, list[int], bytes]:
    return "F32", shape, struct.pack("<f", value) * math.prod(shape)


def some(rng: random.Random, keys: list[str]) -> list[str]:
    return rng.sample(keys, rng.choice([1, 1, 2, 5, len(keys)]))


def halves(tensors: Tensors) -> list[str]:
    return [key for key in tensors if not key.endswith(".alpha")]


# -- twelve ways to spoil a file: from the bytes of a good one to those of a bad one ----------------------------------


def header_flipped(rng: random.Random, good: bytes) -> bytes:
    content, end = bytearray(good), 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(rng.randint(1, 6)):
        content[rng.randrange(8, end)] = rng.choice([rng.randrange(256), rng.choice(b'0123456789"{}[],:FI')])
    return bytes(content)


def truncated(rng: random.Random, good: bytes) -> bytes:
    return good[: rng.choice([rng.randrange(len(good)), rng.randrange(200), len(good) - rng.randint(1, 9)])]


def lengths(rng: random.Random, good: bytes) -> bytes:
    size = struct.unpack("<Q", good[:8])[0]
    wrong = rng.choice([0, 1, size - 1, size + 1, 2 * size, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)])
    tail = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    middle = rng.randrange(len(good))
    return rng.choice([struct.pack("<Q", wrong) + good[8:], good + tail, good[:middle] + tail + good[middle:]])


def shapes(rng: random.Random, good: bytes) -> bytes:
    tensors = unpack(good)
    for key in some(rng, halves(tensors)):
        dtype, shape, raw = tensors[key]
        other = rng.choice(
            [
                shape[::-1],
                rng.sample(shape, len(shape)),
                [math.prod(shape)],
                [1, *shape],
                [*shape, 1, 1],
                [],
                [-1, *shape[1:]],
                [0, *shape],
                [2**40, *shape[1:]],
                [2**63, 2**63],
                [shape[0] * 2, *shape[1:]],
                [dim + rng.randint(-2, 2) for dim in shape],
            ]
        )
        if rng.random() < 0.5 and 0 <= math.prod(other) < 10_000:  # with data to match
            raw = (raw * (4 * math.prod(other) // len(raw) + 1))[: 4 * math.prod(other)]
        tensors[key] = (dtype, other, raw)
    return pack(tensors)


def dtypes(rng: random.Random, good: bytes) -> bytes:
    tensors = unpack(good)
    for key in some(rng, list(tensors)):
        _, shape, raw = tensors[key]
        dtype = rng.choice(list(SIZES))
        size = SIZES[dtype] * math.prod(shape)
        tensors[key] = (dtype, shape, (raw * 2)[:size] if rng.random() < 0.8 else raw)
    return pack(tensors)


def keys(rng: random.Random, good: bytes) -> bytes:
    tensors = unpack(good)
    for key in some(rng, list(tensors)):
        module, _, end = key.partition(".")
        at = rng.randrange(len(key))
        new = rng.choice(
            [
                "",
                key[:at] + rng.choice(string.printable) + key[at + 1 :],
                key[:at] + key[at + 1 :],
                key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"),
                key.replace("lora_down", "lora_up"),
                key.replace("lora_unet_", rng.choice(["", "unet.", "lora_te_", "text_encoder.", "base_model.model."])),
                key.replace(".weight", rng.choice([".bias", ".default.weight", "", ".weight.weight"])),
                f"{module}.{rng.choice(['dora_scale', 'lokr_w1', 'hada_w1_a', 'lora_mid.weight', 'diff'])}",
                f"unet.{module.removeprefix('lora_unet_').replace('_', '.')}.{end}",
                "lora_unet_" + "".join(rng.choices(string.ascii_letters + "._", k=rng.randint(1, 3000))) + "." + end,
            ]
        )
        value = tensors[key] if rng.random() < 0.3 else tensors.pop(key)  # renamed, or there twice
        if new:
            tensors[new] = value
    return pack(tensors)


def values(rng: random.Random, good: bytes) -> bytes:
    tensors = unpack(good)
    wild = rng.choice([math.nan, math.inf, -math.inf, 1e30, -3e38, 7e4, 6e4, 1e-40])
    for key in some(rng, halves(tensors)):
        dtype, shape, raw = tensors[key]
        at = 4 * rng.randrange(len(raw) // 4)
        one = raw[:at] + struct.pack("<f", wild) + raw[at + 4 :]
        tensors[key] = (dtype, shape, one) if rng.random() < 0.5 else floats(wild, shape)
    return pack(tensors)


def data_flipped(rng: random.Random, good: bytes) -> bytes:
    content, start = bytearray(good), 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(rng.choice([1, 5, 50, 2000])):
        content[rng.randrange(start, len(good))] = rng.randrange(256)
    return bytes(content)


def alphas(rng: random.Random, good: bytes) -> bytes:
    tensors = unpack(good)
    for key in some(rng, [key for key in tensors if key.endswith(".alpha")]):
        value = rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e9, -1e9, 1e-9, -2.0, 3e38, 4000.0])
        whole = struct.pack("<q", rng.choice([0, -1, 8, 2**62]))
        tensors[key] = rng.choice(
            [
                *[floats(value, [])] * 4,
                floats(value, [1]),
                floats(2.0, [2]),
                floats(2.0, [0]),
                floats(value, [1, 1, 1]),
                ("I64", [], whole),
                ("BOOL", [], b"\1"),
                ("F8_E4M3", [], b"\x7f"),
                ("F4", [], b"\x11"),
            ]
        )
    return pack(tensors)


def ranks(rng: random.Random, good: bytes) -> bytes:
    tensors = unpack(good)
    downs = [key for key in tensors if key.endswith("lora_down.weight")]
    for key in some(rng, downs)[:3]:
        up = key.replace("down", "up")
        rank, other = rng.choice([(0, 0), (0, 2), (2, 0), (5000, 5000), (1, 1), (3, 2), (2, 2), (2048, 2048)])
        tensors[key] = floats(rng.uniform(-1, 1), [rank, *tensors[key][1][1:]])
        tensors[up] = floats(rng.uniform(-1, 1), [tensors[up][1][0], other, *tensors[up][1][2:]])
    return pack(tensors)


def metadata(rng: random.Random, good: bytes) -> bytes:
    patterns = rng.choice([None, [], ["conv1"], "conv1", 5, {"conv1": None}, {"conv(": 2}, {"": 1e300}, {"to_k": []}])
    alpha = rng.choice([None, "8", math.nan, math.inf, 0, 10**400, -1, True, [8], {}, 1e-300])
    config = {
        "unet.lora_alpha": alpha,
        "unet.alpha_pattern": patterns,
        "unet.use_rslora": rng.choice([0, "no", None, [1]]),
    }
    whole = json.dumps(config)
    text = rng.choice(
        [*[whole] * 5, "", "null", "8", "[" * 50_000, '{"a":' * 50_000, whole[:-5], "\0", "\ud800", "NaN", '"x"']
    )
    tensors = unpack(good)
    if rng.random() < 0.9:  # without alphas of its own
        tensors = {key: tensors[key] for key in halves(tensors)}
    if rng.random() < 0.5:  # in PEFT's spelling the metadata count, and so does what is not LoRA's
        tensors = {peft_key(key): tensors[key] for key in tensors}
    return pack(tensors, rng.choice([*[{"lora_adapter_metadata": text}] * 8, {"lora_adapter_metadata": 5}, [], "x"]))


def peft_key(key: str) -> str:
    return key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")


def two_of_them(rng: random.Random, good: bytes) -> bytes:
    first, second = rng.choice([dtypes, values, alphas, ranks, shapes]), rng.choice([data_flipped, truncated, keys])
    return second(rng, first(rng, good))


WAYS: list[Callable[[random.Random, bytes], bytes]] = [
    header_flipped,
    truncated,
    lengths,
    shapes,
    dtypes,
    keys,
    values,
    data_flipped,
    alphas,
    ranks,
    metadata,
    two_of_them,
]

# -- the test ---------------------------------------------------------------------------------------------------------


class Untouched:
    """What is cheap to compare after every file, and a whole snapshot for every fiftieth."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self._pipe = pipe
        self._objects = self._identities()
        self._weights = [(parameter, parameter.detach().clone()) for parameter in pipe.unet.parameters()]
        self._snapshot = snapshot(pipe)

    def _identities(self) -> list[object]:
        pipe = self._pipe
        return [type(pipe), pipe.scheduler, *pipe.unet.modules(), *pipe.unet.parameters(), *pipe.unet.__dict__]

    def differs(self) -> str | None:
        now = self._identities()
        if len(now) != len(self._objects) or any(a is not b for a, b in zip(now, self._objects, strict=True)):
            return "other objects"
        same = all(torch.equal(parameter, weight) for parameter, weight in self._weights)
        return None if same else "other weights"

    def check_all(self) -> None:
        assert_same(self._snapshot, snapshot(self._pipe))


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    """The smallest that has layers of all kinds."""
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=2)
    made = sd_pipe(unet=tiny_unet(block_out_channels=(4, 8), **blocks))
    assert {kind for kind in TARGET_MODULES for name in lcm_layers(made.unet) if name.endswith("." + kind)} == set(
        TARGET_MODULES
    )
    return made


def test_bad_files_are_refused_or_harmless_and_leave_no_trace(pipe, tmp_path):
    good = write_lora(tmp_path / "good.safetensors", pipe.unet, rank=2)
    content, bad = good.read_bytes(), tmp_path / "bad.safetensors"
    assert unpack(pack(unpack(content))) == unpack(content)
    count = A_KIND * len(WAYS)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    untouched = Untouched(pipe)
    for number in range(count):
        if number == count // 2:
            pipe.unet.to(torch.float16)
            untouched = Untouched(pipe)
        rng, way = random.Random(number), WAYS[number % len(WAYS)]
        bad.write_bytes(way(rng, content))
        outcome = attempt(pipe, rng, good, bad)
        if changed := untouched.differs():
            outcome += f", and left {changed}"
        outcomes[outcome] += 1
        if outcome not in ("refused", "harmless"):
            failures.append(f"{number} {way.__name__}: {outcome}")
        if number % 50 == 0:
            untouched.check_all()
    untouched.check_all()
    assert not failures, "\n".join(failures)
    assert outcomes.total() == count >= 500
    assert outcomes["refused"] > 300
    assert outcomes["harmless"] > 50, "a vain test: hardly any file got as far as the weights"


def attempt(pipe: StableDiffusionPipeline, rng: random.Random, good: Path, bad: Path) -> str:
    """Accelerate with a bad file, as LCM-LoRA or as style, merged or not, and restore."""
    files = rng.choice([dict(lora=bad)] * 4 + [dict(lora=good, styles={"s": lcmlora.Style(bad, 1.0)})])
    options = dict(fuse=rng.choice(["auto", "auto", "auto", False]), keep=rng.choice(["memory", "memory", "disk"]))
    try:
        lcmlora.accelerate(pipe, **files, **options)
    except lcmlora.LcmLoraError as error:
        return "refused" if str(error) else "refused without a word"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    infinite = [name for name, p in pipe.unet.named_parameters() if not torch.isfinite(p).all()]
    lcmlora.restore(pipe)
    return f"{options} made {infinite[0]} infinite" if infinite else "harmless"
