"""Every optimizer: its steps beside a reference, its state to the bit, the bytes of its state, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import kit
from torch import Tensor, nn

import weft.base.pages
from weft.errors import UserError
from weft.files.whole import write_tensors
from weft.libraries import has_kernel
from weft.ops.seeds import stable_seed
from weft.training import JobConfig
from weft.training.optim import make_optimizer, optimizer_tensors, restore_optimizer
from weft.training.optimizers import OPTIMIZERS, paged, tensor_bytes
from weft.training.optimizers.eight_bit import KERNEL

CPU = torch.device("cpu")
bitsandbytes = pytest.importorskip("bitsandbytes")
OLD = not has_kernel(KERNEL, CPU)
USABLE = [name for name in OPTIMIZERS if not (OLD and "8bit" in name)]
ARGS: dict[str, dict[str, Any]] = {
    "sgd": {"nesterov": True},
    "adafactor": {"beta1": 0.5},
    "apollo": {"rank": 3, "update_proj_gap": 2},
}
# 300 x 300 has 90,000 numbers: several blocks of 8 bits, several pages.
SHAPES = [(300, 300), (7,), (40, 5), (5, 40)]


def config(name: str, **more: Any) -> JobConfig:
    given: dict[str, Any] = {"weight_decay": 0.1, "optim_args": ARGS.get(name, {}), **more}
    return JobConfig(name="one", method="lora", optimizer=name, **given)


def begun(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) * 0.1 for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        for parameter, gradient in zip(parameters, gradients(seed, parameters[0].dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()


def made(name: str, parameters: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    return make_optimizer(config(name, **more), parameters, [0.01, 0.02, 0.01, 0.01], [True, False, True, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", USABLE)
def test_the_state_comes_back_to_the_bit(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and "8bit" in name:
        pytest.skip("it has no form for float64")
    first = begun(dtype)
    optimizer = made(name, first)
    assert optimizer_tensors(optimizer) == {}
    run(optimizer, first, range(3))
    stored = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    second = [nn.Parameter(p.detach().clone()) for p in first]
    other = made(name, second)
    restore_optimizer(other, stored)
    run(optimizer, first, range(3, 6))
    run(other, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found, wanted = optimizer_tensors(other), optimizer_tensors(optimizer)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", USABLE)
def test_the_bytes_of_the_state(name: str) -> None:
    parameters = begun()
    optimizer = made(name, parameters)
    run(optimizer, parameters, range(2))
    kind = config(name).optimizer_kind
    found = tensor_bytes(value for value in optimizer_tensors(optimizer).values() if value.dim())
    assert kind.state_bytes(config(name), parameters) == found
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        large = [nn.Parameter(torch.zeros(1000, 1000))]
        assert kind.state_bytes(config(name), large) <= 0.26 * 2 * tensor_bytes(large), "a quarter of AdamW's"


@pytest.mark.parametrize("name", [name for name in ("adamw", "adamw_8bit") if name in USABLE])
def test_pages_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[int] = []
    plain = paged.mapped_zeros

    def counted(like: Tensor, dtype: torch.dtype, folder: str | None) -> Tensor:
        pages.append(like.numel() * dtype.itemsize)
        return plain(like, dtype, folder)

    monkeypatch.setattr(paged, "mapped_zeros", counted)
    found = []
    for one in (name, f"paged_{name}"):
        parameters = begun()
        args = {"folder": str(tmp_path)} if "paged" in one else {}
        optimizer = made(one, parameters, optim_args=args)
        run(optimizer, parameters, range(4))
        restore_optimizer(optimizer, {key: value.clone() for key, value in optimizer_tensors(optimizer).items()})
        run(optimizer, parameters, range(4, 6))
        found.append([*parameters, *optimizer_tensors(optimizer).values()])
    assert max(pages) >= 90_000
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert list(tmp_path.iterdir()) == [], "files without names"


def test_pages_where_the_system_cannot_be_asked_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(weft.base.pages.os, "posix_fallocate")
    found = paged.mapped_zeros(torch.zeros(700, 700), torch.float32, None)
    assert found.shape == (700, 700)
    assert not found.any()
    found.fill_(1)


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weft.base.pages.os, "posix_fallocate", full)
    parameters = begun()
    with pytest.raises(UserError, match=r"is full; 360,000 bytes are needed.*optim_args: \{folder"):
        run(made("paged_adamw", parameters), parameters, range(1))


def test_lion_is_that_of_the_paper() -> None:
    parameters = begun(torch.float64)
    wanted = [p.detach().clone() for p in parameters]
    moments = [torch.zeros_like(p) for p in parameters]
    run(made("lion", parameters), parameters, range(3))
    for seed in range(3):
        for i, g in enumerate(gradients(seed, torch.float64)):
            rate, decay = (0.02, 0.0) if i == 1 else (0.01, 0.1)
            sign = torch.sign(0.9 * moments[i] + 0.1 * g)
            wanted[i] = wanted[i] - rate * (sign + decay * wanted[i])
            moments[i] = 0.99 * moments[i] + 0.01 * g
    assert kit.difference(parameters, wanted) < 1e-12


@pytest.mark.skipif(OLD, reason="this bitsandbytes has no optimizers for CPUs")
def test_lion_equals_bitsandbytes() -> None:
    ours, theirs = begun(), begun()
    run(made("lion", ours, adam_betas=(0.9, 0.98)), ours, range(4))
    groups = [{"params": [p], "lr": 0.02 if i == 1 else 0.01, "weight_decay": 0.0 if i == 1 else 0.1}
              for i, p in enumerate(theirs)]  # fmt: skip
    run(bitsandbytes.optim.Lion(groups, betas=(0.9, 0.98)), theirs, range(4))
    # A sign may fall otherwise where the moment is nearly zero; none does here.
    assert kit.difference(ours, theirs) < 1e-5


def apollo_ref(
    p: Tensor, grads: list[Tensor], *, rate: float, decay: float, number: int, rank: int, gap: int, kind: str
) -> Tensor:
    """The equations of APOLLO, one matrix alone."""
    moment = square = before = None
    for t, g in enumerate(grads):
        tall = p.shape[0] > p.shape[1]
        own = g.t() if tall else g
        seed = stable_seed(0, "apollo", number, t // gap)
        projection = torch.randn(rank, len(own), generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
        r = projection.to(g) @ own
        moment = 0.1 * r if moment is None else 0.9 * moment + 0.1 * r
        square = 0.001 * r * r if square is None else 0.999 * square + 0.001 * r * r
        n = moment / (square.sqrt() + 1e-8)
        s = n.norm(dim=0) / (r.norm(dim=0) + 1e-8) if kind == "channel" else n.norm() / (r.norm() + 1e-8)
        scaled = own * s
        norm = scaled.norm()
        if before is not None and norm > 1.01 * before:
            scaled, norm = scaled * (1.01 * before / norm), 1.01 * before
        before = norm
        correction = math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        p = p - rate * decay * p - rate * correction * (scaled.t() if tall else scaled)
    return p


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_apollo_is_that_of_the_paper(kind: str) -> None:
    parameters = begun(torch.float64)
    args = {"rank": 3, "update_proj_gap": 2, "scale_type": kind}
    wanted = [p.detach().clone() for p in parameters]
    run(made("apollo", parameters, optim_args=args), parameters, range(5))
    # The numbers are those of a checkpoint: by rate first.
    for i, number in ((0, 0), (2, 1), (3, 2)):
        grads = [gradients(seed, torch.float64)[i] for seed in range(5)]
        ref = apollo_ref(wanted[i], grads, rate=0.01, decay=0.1, number=number, rank=3, gap=2, kind=kind)
        assert kit.difference([parameters[i]], [ref]) < 1e-7, "1e-8 is added where the reference compares"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("adamw_8bit", [torch.zeros(3, dtype=torch.float64)], "adamw_8bit has no form for float64"),
        ("apollo", [torch.zeros(50), torch.zeros(4, 90)], "saves nothing with method lora.*the largest here has 4"),
        ("paged_adamw", [torch.zeros(3)], "folder: /no/such/place is no folder"),
    ],
)
def test_what_is_refused(name: str, parameters: list[Tensor], message: str) -> None:
    args = {"optim_args": {"folder": "/no/such/place"}} if name == "paged_adamw" else {"optim_args": {}}
    with pytest.raises(UserError, match=message):
        make_optimizer(config(name, **args), [nn.Parameter(p) for p in parameters], [0.1] * len(parameters))


def test_a_missing_package_is_told_with_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r'paged_adamw_8bit needs bitsandbytes: pip install "weft\[quant\]"'):
        config("paged_adamw_8bit")


def test_a_bitsandbytes_without_kernels_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.training.optimizers.eight_bit.has_kernel", lambda *_: False)
    with pytest.raises(UserError, match=r"no 8-bit optimizer for cpu.*pip install --upgrade"):
        made("adamw_8bit", begun())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adamw", "optim_args": {"rank": 3}}, "adamw has no option 'rank'; it has none"),
        ({"optimizer": "apollo", "optim_args": "rank=0"}, "rank is 0; expected: greater than 0"),
        ({"optimizer": "sgd", "optim_args": "nesterov"}, "name=value"),
        ({"optimizer": "apollo", "optim_args": {"scale_type": "row"}}, "scale_type is 'row'; expected: 'channel'"),
    ],
)
def test_wrong_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobConfig(name="one", method="lora", **given)


@pytest.mark.parametrize("name", USABLE)
def test_the_state_of_several_large_tensors_can_be_saved(name: str, tmp_path: Path) -> None:
    """bitsandbytes gives all of them one table, and a file holds no tensors that share memory."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(300, 300, generator=generator)) for _ in range(3)]
    optimizer = make_optimizer(config(name), parameters, [0.01] * 3)
    for parameter in parameters:
        parameter.grad = torch.randn(300, 300, generator=generator)
    optimizer.step()
    found = optimizer_tensors(optimizer)
    write_tensors(found, tmp_path / "state.safetensors")
    again = load_file(tmp_path / "state.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[key], value) for key, value in found.items())
