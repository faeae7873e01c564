"""A Pre-LN transformer equals its Pre-RMSNorm and Pre-CRMSNorm forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normkit.errors import InputError, NormkitError
from normkit.nn import CRMSNorm, LayerNorm, RMSNorm
from normkit.surgery import Stream, bake, recenter, stream_means
from normkit.surgery.layers import CompletedCRMSNorm
from normkit.surgery.reads import largest_difference, run
from normkit.surgery.samples import sample_inputs
from tests.reference import pre_rmsnorm as oracle
from tests.surgery import tiny

BOTH = pytest.mark.parametrize("to", ["pre-rmsnorm", "pre-crmsnorm"])
SCALED = ("dinov2", "dinov2-swiglu")


@BOTH
@pytest.mark.parametrize("untie", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("name", tiny.PRE_LN)
def test_a_converted_model_equals_the_original(name, untie, to):
    model = tiny.build(name)
    original = copy.deepcopy(model)
    report = recenter(model, to, untie=untie)
    inputs = sample_inputs(model, batch=3, seed=7)
    before, after = run(original, inputs), run(model, inputs)
    assert largest_difference(before, after) < 1e-10
    assert float(before[0].abs().max()) > 0.5
    assert report.numbers["largest_mean"] < 1e-12
    assert report.changed
    assert not report.skipped


@BOTH
@pytest.mark.parametrize("name", tiny.PRE_LN)
def test_in_float32_logits_stay_within_1e_5(name, to):
    model = tiny.build(name, torch.float32)
    original = copy.deepcopy(model)
    recenter(model, to)
    inputs = sample_inputs(model, seed=7)
    assert largest_difference(run(original, inputs)[:1], run(model, inputs)[:1]) < 1e-5


@pytest.mark.parametrize("name", tiny.PRE_LN)
def test_no_norm_on_the_stream_reads_a_mean_and_no_layer_norm_is_left_there(name):
    model = tiny.build(name)
    inputs = sample_inputs(model, seed=3)
    assert max(stream_means(model, inputs).values()) > 0.01
    recenter(model)
    norms = {p: m for p, m in model.named_modules() if isinstance(m, RMSNorm)}
    means = stream_means(model, inputs, list(norms))
    assert len(means) >= 3
    assert max(means.values()) < 1e-12
    rest = [p for p, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert all("q_layernorm" in p or "k_layernorm" in p for p in rest)


@pytest.mark.parametrize("name", [n for n in tiny.PRE_LN if n not in SCALED])
@BOTH
def test_the_online_form_equals_the_original_and_can_be_baked(name, to):
    model = tiny.build(name)
    original = copy.deepcopy(model)
    recenter(model, to, online=True)
    inputs = sample_inputs(model, seed=7)
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-10
    bake(model)
    assert not any("parametrizations" in p for p, _ in model.named_parameters())
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-10


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(("name", "to"), [("gpt2", "pre-rmsnorm"), ("gpt-neox", "pre-crmsnorm")])
def test_twenty_steps_of_the_online_form_are_those_of_the_original(name, to, optimizer):
    model = tiny.build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    original = copy.deepcopy(model)
    recenter(model, to, online=True)
    losses = [_train(m, optimizer) for m in (original, model)]
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-9)
    bake(model)
    inputs = sample_inputs(model, seed=7)
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-9


def test_the_form_converted_once_starts_equal_and_then_leaves_the_path_under_adam():
    model = tiny.build("gpt-neox")
    original = copy.deepcopy(model)
    recenter(model)
    a, b = (_train(m, "AdamW") for m in (original, model))
    assert abs(a[0] - b[0]) < 1e-12
    assert abs(a[-1] - b[-1]) > 1e-6


def _train(model, optimizer):
    options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 3e-3, "weight_decay": 0.1}}
    step = getattr(torch.optim, optimizer)(model.parameters(), **options[optimizer])
    dice = torch.Generator().manual_seed(1)
    model.train()
    losses = []
    for _ in range(20):
        ids = torch.randint(61, (2, 10), generator=dice)
        loss = F.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    return losses


@BOTH
def test_generation_with_a_cache_gives_the_same_tokens(to):
    model = tiny.build("gpt2")
    original = copy.deepcopy(model)
    recenter(model, to)
    ids = torch.tensor([[5, 3, 9]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, **options).tolist() == original.generate(ids, **options).tolist()


def test_inputs_of_tiny_variance_see_the_same_eps():
    model = tiny.build("vit")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embeddings" in name or "o_proj" in name or "fc2" in name:
                p.copy_(3.0 + 1e-4 * p)  # a large mean, a variance of the size of eps
    original = copy.deepcopy(model)
    recenter(model)
    inputs = {"pixel_values": 1e-3 * sample_inputs(model)["pixel_values"]}
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-9


@BOTH
def test_a_model_in_bfloat16_is_rounded_once(to):
    model = tiny.build("gpt2", torch.bfloat16)
    wide = copy.deepcopy(model).double()
    recenter(model, to)
    recenter(wide, to)
    for (name, a), b in zip(model.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=0, atol=0, msg=name)


def test_parameters_keep_identity_ties_and_requires_grad():
    model = tiny.build("gpt2")
    model.transformer.h[0].mlp.c_proj.weight.requires_grad = False
    kept = dict(model.named_parameters())
    recenter(model)
    now = dict(model.named_parameters())
    assert now.keys() == kept.keys()
    assert all(now[name] is p for name, p in kept.items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.transformer.h[0].mlp.c_proj.weight.requires_grad


def test_untying_leaves_the_head_as_it_was():
    model = tiny.build("gpt2")
    table = model.lm_head.weight.detach().clone()
    recenter(model, untie=True)
    assert torch.equal(model.lm_head.weight, table)
    assert model.transformer.wte.weight.mean(1).abs().max().item() < 1e-15
    assert model.config.tie_word_embeddings is False


def test_crms_layers_carry_one_channel_less():
    model = tiny.build("gptj")
    recenter(model, "pre-crmsnorm")
    block = model.transformer.h[0]
    assert isinstance(block.ln_1, CRMSNorm)
    assert isinstance(model.transformer.ln_f, CompletedCRMSNorm)
    assert block.mlp.fc_out.weight.shape == (31, 128)
    assert (block.mlp.fc_in.in_features, block.mlp.fc_out.out_features) == (31, 31)
    assert block.attn.q_proj.bias is not None  # the shift of the norm came in


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny.post_ln("opt-350m"), "post-LN.*final_layer_norm"),
        (lambda: tiny.post_ln("Bert"), "post-LN"),
        (lambda: tiny.post_ln("Roberta"), "post-LN"),
        (lambda: tiny.randomize(tiny.llama()), "RMSNorm already.*LlamaRMSNorm"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "no map says.*Stream"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "has none.*BatchNorm1d"),
    ],
    ids=["opt-350m", "bert", "roberta", "llama", "unknown", "no-layer-norm"],
)
def test_models_out_of_reach_are_refused_with_the_reason(model, reason):
    with pytest.raises(InputError, match=reason):
        recenter(model())


class Block(nn.Module):
    """A block of a model that normkit has no map for."""

    def __init__(self, d, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(d), norm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        x = x + self.o(scores.softmax(-1) @ v)
        return x + self.down(self.up(self.norm2(x)).tanh())


class Own(nn.Module):
    """A user's model."""

    def __init__(self, d=8, depth=2, norm=nn.LayerNorm):
        super().__init__()
        self.tokens = nn.Embedding(11, d)
        self.blocks = nn.ModuleList(Block(d, norm) for _ in range(depth))
        self.norm = norm(d)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


OWN = Stream(
    module="Own",
    blocks="blocks.*",
    norms=("blocks.*.norm1", "blocks.*.norm2", "norm"),
    writers=("blocks.*.o", "blocks.*.down"),
    embeddings=("tokens",),
)
IDS = torch.tensor([[1, 5, 2, 10, 7]])


@BOTH
def test_a_users_map_converts_a_users_model_as_the_oracle_does(to):
    model = tiny.randomize(Own().double())
    embeddings = model.tokens(IDS[0]).detach().numpy()
    blocks = [_as_oracle(block) for block in model.blocks]
    expected = oracle.forward(embeddings, blocks, oracle.layer_norm)
    recenter(model, to, streams=[OWN], inputs=(IDS,))

    stream = model.tokens(IDS)
    for block in model.blocks:
        stream = block(stream)
    centered = oracle.recenter(embeddings, blocks)
    if to == "pre-rmsnorm":
        same = oracle.forward(*centered, oracle.rms_norm)
    else:
        norm = lambda z, _gain, _shift, eps: oracle.crms_norm(z, eps)  # noqa: E731
        same = oracle.forward(*oracle.compress(*centered), norm)
    np.testing.assert_allclose(stream[0].detach().numpy(), same, atol=1e-12)
    width = same.shape[1]
    mean = expected.mean(1, keepdims=True)
    np.testing.assert_allclose(same, (expected - mean)[:, :width], atol=1e-12)


def _as_oracle(block):
    made = {}
    for name in ("q", "k", "v", "o", "up", "down"):
        layer = getattr(block, name)
        made[name] = layer.weight.detach().numpy().T.copy()
        made[name + "_bias"] = layer.bias.detach().numpy().copy()
    for i in "12":
        norm = getattr(block, "norm" + i)
        made["gain" + i] = norm.weight.detach().numpy().copy()
        made["shift" + i] = norm.bias.detach().numpy().copy()
    return made


@pytest.mark.parametrize("missing", OWN.writers)
@BOTH
def test_a_map_that_misses_a_writer_is_found_out_and_undone(missing, to):
    writers = tuple(w for w in OWN.writers if w != missing)
    wrong = Stream("Own", OWN.blocks, OWN.norms, writers, OWN.embeddings)
    model = tiny.randomize(Own().double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormkitError, match="misses what writes to it"):
        recenter(model, to, streams=[wrong], inputs=(IDS,))
    assert {type(m) for m in model.modules()} == {type(m) for m in Own().modules()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.blocks[0].down.out_features == 8


def test_norms_over_other_axes_and_other_norms_are_refused():
    other = {
        "not a LayerNorm": lambda d: nn.GroupNorm(1, 5),
        "not one axis": lambda d: nn.LayerNorm((5, d)),
    }
    for reason, norm in other.items():
        with pytest.raises(InputError, match=reason):
            recenter(Own(norm=norm), streams=[OWN], inputs=(IDS,))


def test_integer_weights_are_refused():
    model = Own()
    weight = (10 * model.blocks[0].down.weight.data).to(torch.int8)
    model.blocks[0].down.weight = nn.Parameter(weight, requires_grad=False)

    def forward(layer, args):
        layer.weight.data = layer.weight.data.float()

    model.blocks[0].down.register_forward_pre_hook(forward)
    model.blocks[0].down.register_forward_hook(
        lambda layer, *_: setattr(layer.weight, "data", layer.weight.data.to(torch.int8))
    )
    with pytest.raises(InputError, match=r"blocks.0.down.weight is torch.int8"):
        recenter(model, streams=[OWN], inputs=(IDS,))


def test_worked_numbers_of_the_vector_1_2_4_5():
    x = torch.tensor([1.0, 2, 4, 5], dtype=torch.float64)
    centered = x - x.mean()
    assert centered.tolist() == [-2, -1, 1, 2]
    rms = 2.5**0.5  # 1.5811388
    full = RMSNorm(4, eps=0.0).double()(centered)
    torch.testing.assert_close(full, centered / rms, rtol=0, atol=1e-15)
    short = CRMSNorm(3, eps=0.0)(centered[:-1])  # (4 + 1 + 1 + 2^2) / 4 = 2.5
    torch.testing.assert_close(short, full[:-1], rtol=0, atol=1e-15)
    torch.testing.assert_close(CompletedCRMSNorm(4, 0.0).double()(centered[:-1]), full)
    torch.testing.assert_close(full, F.layer_norm(x, (4,), eps=0.0))


@pytest.mark.parametrize("bad", ["pre-layernorm", ""])
def test_an_unknown_target_is_refused(bad):
    with pytest.raises(InputError, match="to must be one of"):
        recenter(tiny.build("gpt2"), bad)


def test_a_second_conversion_is_refused():
    model = tiny.build("gpt2")
    recenter(model)
    with pytest.raises(InputError, match="not a LayerNorm"):
        recenter(model)
    model = tiny.build("gpt2")
    recenter(model, online=True)
    with pytest.raises(InputError, match="not a LayerNorm"):
        recenter(model, online=True)


@BOTH
def test_zero_centered_gains_keep_their_meaning(to):
    norm = lambda d: LayerNorm(d, zero_centered=True)  # noqa: E731
    model = tiny.randomize(Own(norm=norm).double())
    original = copy.deepcopy(model)
    recenter(model, to, streams=[OWN], inputs=(IDS,))
    assert largest_difference(run(original, (IDS,)), run(model, (IDS,))) < 1e-12


def test_dropout_on_the_stream_is_noted():
    assert "resid_pdrop" in recenter(tiny.build("gpt2")).notes[0]
    assert not recenter(tiny.build("gpt-neox")).notes


def test_half_precision_completes_the_vector_in_float32():
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(64, 768, generator=dice, dtype=torch.float64)
    z = (x - x.mean(1, keepdim=True))[:, :-1].bfloat16()
    full = torch.cat((z.double(), -z.double().sum(1, keepdim=True)), 1)
    got = CompletedCRMSNorm(768, bias=False).bfloat16()(z)
    torch.testing.assert_close(got, RMSNorm(768, 1e-5).double()(full).bfloat16())
