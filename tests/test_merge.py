"""The merge itself, on layers larger than one tile and in every memory layout."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lcmlora
from conftest import assert_same, sd_pipe, snapshot
from lcmlora.lora.merge import Factors, merge
from lcmlora.lora.originals import Originals


@dataclasses.dataclass
class Given:
    """A LoRA of one layer, "x"."""

    scale: float
    up: torch.Tensor
    down: torch.Tensor
    layers = frozenset({"x"})
    found = MappingProxyType({})

    @contextmanager
    def opened(self):
        yield lambda layer: Factors(self.scale, self.up, self.down)


def given(layer: nn.Module, rank: int, scale: float, seed: int) -> Given:
    torch.manual_seed(seed)
    out, *rest = layer.weight.shape
    return Given(scale, torch.randn(out, rank) * 0.1, torch.randn(rank, torch.Size(rest).numel()) * 0.1)


def transposed() -> nn.Module:
    layer = nn.Linear(1400, 1500)
    layer.weight = nn.Parameter(torch.randn(1400, 1500).t())
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(1400, 2700),
    "convolution": lambda: nn.Conv2d(300, 1300, 3),
    "channels_last": lambda: nn.Conv2d(300, 1300, 3).to(memory_format=torch.channels_last),
    "1 x 1": lambda: nn.Conv2d(1400, 40, 1),
    "transposed": transposed,
    "every other row": lambda: with_gaps(nn.Linear(50, 60), torch.randn(120, 50), (slice(None, None, 2),)),
    "every other channel": lambda: with_gaps(
        nn.Conv2d(10, 40, 3), torch.randn(40, 20, 3, 3), (slice(None), slice(None, None, 2))
    ),
}


def with_gaps(layer: nn.Module, whole: torch.Tensor, where: tuple[slice, ...]) -> nn.Module:
    layer.weight = nn.Parameter(whole[where])
    return layer


@pytest.mark.parametrize("keep", ["memory", "disk", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_merge_is_one_product_rounded_once_in_the_weights_own_memory(kind, dtype, keep):
    layer = LAYERS[kind]()
    whole = layer.weight.data
    layer.weight.data = torch.empty(whole.untyped_storage().nbytes(), dtype=dtype).as_strided(
        whole.shape, whole.stride()
    )
    layer.weight.data.copy_(whole)
    before, place, strides = layer.weight.detach().clone(), layer.weight.data_ptr(), layer.weight.stride()
    a, b = given(layer, 5, 0.5, 1), given(layer, 3, 2.0, 2)
    originals = Originals(keep)
    merge({"x": layer}, {"b": b, "a": a}, {"a": 0.7, "b": -0.4}, originals)
    sum_ = before.double() + (
        0.35 * (a.up.double() @ a.down.double()) - 0.8 * (b.up.double() @ b.down.double())
    ).view_as(before)
    torch.testing.assert_close(
        layer.weight.double(), sum_.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    assert (layer.weight.data_ptr(), layer.weight.stride()) == (place, strides)
    assert originals.bytes == (before.nbytes if keep else 0)
    assert originals.lost == (keep is None)
    if keep:
        merge({"x": layer}, {}, {}, originals)
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("row", [0, 1399])
def test_a_sum_that_is_not_finite_is_refused_wherever_it_is(value, row):
    layer = nn.Linear(1400, 1400).half()
    lora = given(layer, 4, 1.0, 1)
    lora.up[row, 2] = value
    with pytest.raises(lcmlora.LoraFileError, match="a would make weights of x infinite or NaN"):
        merge({"x": layer}, {"a": lora}, {"a": 1.0}, Originals("memory"))


def test_originals_without_memory_for_them_name_the_other_ways():
    weight = nn.Parameter(torch.empty(1 << 58, device="meta"))
    with pytest.raises(lcmlora.PipelineError, match=r"keep='memory' needs 1099511627776 MiB.*keep='disk'"):
        Originals("memory").expect({"x": weight})


def test_without_originals_a_damaged_file_is_found_before_the_first_change(lcm_file):
    pipe = sd_pipe()
    before, file = snapshot(pipe), lcm_file(pipe)
    tensors = load_file(file)
    tensors[next(key for key in reversed(list(tensors)) if key.endswith("up.weight"))][-1, -1] = torch.nan
    save_file(tensors, file)
    with pytest.raises(lcmlora.LoraFileError, match="holds NaN or infinity"):
        lcmlora.accelerate(pipe, lora=file, keep=None)
    assert_same(before, snapshot(pipe))
