"""What norms with running statistics share: masks, layouts, processes, saved state."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from normkit.errors import InputError
from normkit.nn import PowerNorm, UnifiedNorm

LAYERS = {
    "unified": partial(UnifiedNorm, window_size=3, warmup=2, filter_outliers=True),
    "unified-alone": partial(UnifiedNorm, window_size=1),
    "power": partial(PowerNorm, warmup=3, groups=2),
    "power-no-scale": partial(PowerNorm, warmup=0, groups=None),
}
STEPS = 8


def batches(n=STEPS, shape=(6, 5, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    for i in range(n):
        pair = torch.randn(2, *shape, generator=generator, dtype=dtype)
        yield (1 + i / 4) * pair[0], pair[1]


def step(layer, x, grad, **keywords):
    """Output and derivatives of one training step."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, **keywords)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def assert_same_state(a, b, **tolerance):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, msg=name, **tolerance)


@pytest.fixture(params=LAYERS, ids=str)
def make(request):
    return partial(LAYERS[request.param], 4, dtype=torch.float64)


def test_masked_tokens_might_as_well_not_be_there(make):
    layer, compact = make(), make()
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    for x, grad in batches():
        found = step(layer, x, grad * mask[..., None], mask=mask)
        expected = step(compact, x[mask], grad[mask])
        for a, b in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(a[mask], b)
        for a, b in zip(found[2:], expected[2:], strict=True):
            torch.testing.assert_close(a, b)
        assert_same_state(layer, compact)


def test_a_batch_that_is_masked_altogether_moves_nothing(make):
    layer = make()
    for x, grad in batches(5):
        step(layer, x, grad)
    before = copy.deepcopy(layer)
    found = step(layer, x, grad, mask=torch.zeros(6, 5, dtype=torch.bool))
    assert all(t.isfinite().all() for t in found)
    assert_same_state(before, layer, rtol=0, atol=0)


def test_channels_first_is_a_permutation(make):
    last, first = make(), make(channel_dim=1)
    for x, grad in batches():
        a = step(last, x, grad)
        b = step(first, x.mT, grad.mT)
        torch.testing.assert_close(b[0].mT, a[0])
        torch.testing.assert_close(b[1].mT, a[1])
        assert_same_state(last, first)


def test_a_saved_layer_goes_on_bit_for_bit(make):
    layer = make()
    steps = list(batches(12))
    for x, grad in steps[:5]:
        step(layer, x, grad)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    for x, grad in steps[5:]:
        for a, b in zip(step(layer, x, grad), step(resumed, x, grad), strict=True):
            assert torch.equal(a, b)
    assert_same_state(layer, resumed, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_follows_the_same_recurrence(make, backend):
    torch.compiler.reset()
    layer = make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for x, grad in batches():
        expected = step(layer, x, grad)
        again = x.clone().requires_grad_()
        twin.zero_grad()
        out = compiled(again)
        out.backward(grad)
        for a, b in zip(
            [out.detach(), again.grad, *(p.grad for p in twin.parameters())], expected, strict=True
        ):
            torch.testing.assert_close(a, b)
        assert_same_state(layer, twin)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_statistics_move_without_derivatives_too_compiled_or_not(make, without):
    torch.compiler.reset()
    layer = make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with without():
        for x, _ in batches(5):
            torch.testing.assert_close(compiled(x), layer(x))
    assert_same_state(layer, twin)
    assert int(layer.num_batches_tracked) == 5


def test_the_affine_map_is_the_layer_in_evaluation():
    for name in ("unified", "power-no-scale"):
        layer = LAYERS[name](4, dtype=torch.float64)
        for x, grad in batches():
            step(layer, x, grad)
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
        scale, shift = layer.eval().inference_affine()
        torch.testing.assert_close(layer(x), x * scale + shift)
        bare = LAYERS[name](4, affine=False).eval()
        assert bare.inference_affine()[1].eq(0).all()


def _shard(rank, path, name, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    layer = LAYERS[name](4, dtype=torch.float64, sync=True)
    found = []
    for x, grad in batches():
        mine = slice(0, 2) if rank == 0 else slice(2, 6)  # shards of unequal size
        found.append(step(layer, x[mine], grad[mine]))
    queue.put((rank, [[t.numpy() for t in row] for row in found], layer.running_grad.numpy()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unified", "power"])
def test_two_processes_are_one(name, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (tmp_path / "meet", name, queue)
    workers = [context.Process(target=_shard, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = {rank: rest for rank, *rest in (queue.get(timeout=120) for _ in workers)}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    whole = LAYERS[name](4, dtype=torch.float64)
    for i, (x, grad) in enumerate(batches()):
        expected = step(whole, x, grad)
        first, second = (list(map(torch.from_numpy, results[rank][0][i])) for rank in range(2))
        for a, b, c in zip(first[:2], second[:2], expected[:2], strict=True):
            torch.testing.assert_close(torch.cat([a, b]), c)
        for a, b, c in zip(first[2:], second[2:], expected[2:], strict=True):
            torch.testing.assert_close(a + b, c)
    for rank in range(2):
        torch.testing.assert_close(torch.from_numpy(results[rank][1]), whole.running_grad)


def test_second_derivatives_are_refused(make):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(make()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_features": 0}, "num_features"),
        ({"eps": -1.0}, "eps"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    for layer in (UnifiedNorm, PowerNorm):
        with pytest.raises(InputError, match=name):
            layer(**{"num_features": 4, **arguments})


def test_bad_masks_are_refused(make):
    layer, x = make(), torch.randn(3, 5, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="mask must be bool"):
        layer(x, torch.ones(3, 5))
    with pytest.raises(InputError, match="mask must have the leading dimensions"):
        layer(x, torch.ones(5, 3, dtype=torch.bool))
