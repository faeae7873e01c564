"""The correction by hand, over micro-batches and processes, and what optimizers make of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from normkit.errors import InputError
from normkit.optim import ClippingBias
from tests.reference import st_ppo

MODES = ["floor", "ratio", "paper", "measure"]


def layer(value=0.0):
    """Three weights as two parameters, so that norms run over both."""
    module = nn.ParameterList([torch.full((2,), value), torch.full((1,), value)])
    return module.double()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def along(module, direction):
    """A loss whose gradient is ``direction``."""
    return (flat_graph(module) * torch.tensor(direction, dtype=torch.float64)).sum()


def flat_graph(module):
    return torch.cat([p.flatten() for p in module])


def stepped(mode, gradient, biases, **options):
    """Gradients after one correction, and its norms."""
    module = layer()
    correction = ClippingBias(module.parameters(), mode, **options)
    for bias in biases:
        correction.collect(along(module, bias))
    along(module, gradient).backward()
    norms = correction.correct()
    return flat(p.grad for p in module), norms


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [0.25, 1.0, 40.0])
def test_gradients_are_divided_as_the_mode_says(mode, size):
    gradient, bias = [3.0, -4.0, 12.0], [0.6 * size, 0.0, -0.8 * size]
    options = {"c0": 2.0, "delta": 0.1}
    found, norms = stepped(mode, gradient, [bias], **options)
    expected = st_ppo.corrected(gradient, bias, mode, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert [float(n) for n in norms] == pytest.approx([13, size, np.linalg.norm(expected)])


def test_the_bias_is_that_of_the_batch_not_of_its_parts():
    parts = [[5.0, 0.0, 0.0], [-5.0, 0.0, 0.0], [0.0, 3.0, 4.0]]
    found, norms = stepped("floor", [1.0, 0.0, 0.0], parts)
    assert float(norms.bias) == pytest.approx(5)
    assert found.tolist() == pytest.approx([0.2, 0, 0])


def test_an_update_does_not_remember_the_last_one():
    module = layer()
    correction = ClippingBias(module.parameters())
    for expected in (7.0, 7.0):
        correction.collect(along(module, [0.0, 7.0, 0.0]))
        along(module, [1.0, 0.0, 0.0]).backward()
        assert float(correction.correct().bias) == pytest.approx(expected)


def test_an_update_that_was_given_up_leaves_nothing_behind():
    module = layer()
    correction = ClippingBias(module.parameters())
    correction.collect(along(module, [0.0, 7.0, 0.0]))
    correction.forget()
    along(module, [1.0, 0.0, 0.0]).backward()
    assert correction.correct().bias == 0


@pytest.mark.parametrize("mode", ["floor", "ratio", "measure"])
def test_where_nothing_is_clipped_there_is_no_second_pass_and_no_change(mode, monkeypatch):
    module = layer()
    correction = ClippingBias(module.parameters(), mode)
    monkeypatch.setattr(torch.autograd, "grad", None)
    correction.collect(None)
    along(module, [0.1, -0.2, 0.3]).backward()
    before = flat(p.grad for p in module).clone()
    norms = correction.correct()
    assert torch.equal(flat(p.grad for p in module), before)
    assert norms.bias == 0
    assert norms.corrected == norms.gradient


def test_the_paper_s_form_explodes_on_policy():
    """Why it is not the default."""
    _, norms = stepped("paper", [0.6, 0.0, 0.8], [])
    assert float(norms.corrected) == pytest.approx(1e6)


def test_gradients_that_share_memory_are_counted_once():
    """Autograd hands two summands the very same tensor."""
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    correction = ClippingBias([a, b])
    for _ in range(2):
        correction.collect((a + b).sum())
    (a + b).sum().backward()
    assert float(correction.correct().bias) == pytest.approx(2 * 2)  # four entries of 2


def test_parameters_outside_the_graph_and_without_gradients_count_as_zero():
    used, unused, frozen = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    frozen.requires_grad_(False)
    correction = ClippingBias([used, unused, frozen])
    correction.collect(3 * used.sum())
    used.sum().backward()
    assert [float(n) for n in correction.correct()] == pytest.approx([1, 3, 1 / 3])
    assert unused.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_an_update_without_gradients_has_nothing_to_correct(mode):
    weight = nn.Parameter(torch.zeros(1))
    correction = ClippingBias([weight], mode)
    correction.collect(3 * weight.sum())
    assert [float(n) for n in correction.correct()] == [0, 3, 0]
    assert weight.grad is None


def trained(make, factors, weight=0.0, power=False):
    """Weights after updates whose gradients were divided by ``factors``."""
    module = layer(1.0)
    optimizer = make(module.parameters(), lr=0.1, weight_decay=weight)
    generator = torch.Generator().manual_seed(0)
    correction = ClippingBias(module.parameters(), "floor", c0=1.0)
    for factor in factors:
        optimizer.zero_grad()
        correction.collect(along(module, [factor, 0.0, 0.0]))
        along(module, torch.randn(3, generator=generator).tolist()).backward()
        correction.correct()
        optimizer.step()
    return flat(module.parameters())


def adam(parameters, **options):
    return torch.optim.Adam(parameters, eps=0.0, **options)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, eps=0.0, **options)


@pytest.mark.parametrize("make", [adam, adamw])
def test_adam_does_not_feel_a_constant_factor(make):
    plain = trained(make, [1.0] * 5)
    assert torch.equal(trained(make, [8.0] * 5), plain)  # a power of two only moves exponents
    torch.testing.assert_close(trained(make, [7.3] * 5), plain, rtol=1e-12, atol=0)
    moved = (trained(make, [1.0, 1.0, 8.0, 8.0, 8.0]) - plain).abs().max()
    assert moved > 0.01  # but changes of it


def test_weight_decay_feels_it_where_it_is_part_of_the_gradient():
    assert (trained(adam, [8.0] * 5, 0.1) - trained(adam, [1.0] * 5, 0.1)).abs().max() > 0.01
    decoupled = [trained(adamw, [factor] * 5, 0.1) for factor in (8.0, 1.0)]
    torch.testing.assert_close(*decoupled, rtol=1e-12, atol=0)


def test_a_maximum_norm_after_it_can_hide_it_and_before_it_cannot():
    module = layer()
    for clipped_first, size in ((True, 0.1), (False, 1.0)):
        correction = ClippingBias(module.parameters())
        module.zero_grad()
        correction.collect(along(module, [10.0, 0.0, 0.0]))
        along(module, [30.0, 0.0, 40.0]).backward()
        steps = [lambda: nn.utils.clip_grad_norm_(module.parameters(), 1.0), correction.correct]
        for step in steps if clipped_first else steps[::-1]:
            step()
        assert float(flat(p.grad for p in module).norm()) == pytest.approx(size, rel=1e-5)


WORKER = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from safetensors.torch import save_file
from normkit.optim import ClippingBias
from normkit.runs import leave
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
layer = torch.nn.Linear(4, 1).double()
wrapped = DistributedDataParallel(layer)
x = torch.randn(6, 4).double()
clipped = torch.tensor([1.0, 0, 1, 0, 0, 0])  # none in the second half
mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
correction = ClippingBias(layer.parameters())
out = wrapped(x[mine])[:, 0]
if clipped[mine].any():
    correction.collect((9 * clipped[mine] * out).sum() * world)
(out.square().sum() * world).backward()
norms = correction.correct()
found = {"grad": layer.weight.grad.clone(), "norms": torch.stack(list(norms))}
wrapped(x[mine]).sum().backward()
assert correction.correct().bias == 0
if rank == 0:
    save_file(found, sys.argv[1])
dist.barrier()
leave(0)
"""


@pytest.mark.slow
def test_two_processes_correct_as_one_even_if_only_one_clips(tmp_path):
    root = Path(__file__).parents[2]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    found = []
    for n in (1, 2):
        out = tmp_path / f"{n}.safetensors"
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]
        command = [sys.executable, *launch, str(script), str(out)]
        subprocess.run(command, env=environment, cwd=root, check=True, timeout=300)
        found.append(load_file(out))
    assert found[0]["norms"][1] > 1
    for name in ("grad", "norms"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "best"}, "mode must be one of floor, ratio, paper, measure"),
        ({"c0": 0.0}, "c0 must be above 0"),
        ({"delta": -1.0}, "delta must be above 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words):
        ClippingBias(layer().parameters(), **options)


def test_without_anything_to_train_it_says_so():
    with pytest.raises(InputError, match="at least one that requires a gradient"):
        ClippingBias([])
