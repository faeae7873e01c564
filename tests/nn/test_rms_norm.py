"""RMSNorm and CRMSNorm."""

from __future__ import annotations

import pytest
import torch

from normkit.errors import InputError
from normkit.functional.norms import complete, compress
from normkit.nn import CRMSNorm, RMSNorm
from tests.reference.rms_norm import rms_norm


def test_values_are_the_oracle_s():
    x = torch.randn(5, 6, dtype=torch.float64)
    norm = RMSNorm(6, eps=1e-3, bias=True).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = torch.from_numpy(rms_norm(x.numpy(), weight, bias, 1e-3))
    torch.testing.assert_close(norm(x).detach(), expected)


def test_no_eps_is_the_machine_epsilon_of_the_statistics():
    x = torch.full((1, 4), 1e-4, dtype=torch.bfloat16)
    power = float(x[0, 0]) ** 2
    expected = float(x[0, 0]) / (power + torch.finfo(torch.float32).eps) ** 0.5
    assert float(RMSNorm(4)(x).detach()[0, 0]) == pytest.approx(expected, rel=1e-2)


def test_crms_norm_reads_compressed_vectors():
    x = torch.randn(5, 8, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    whole = RMSNorm(8, eps=1e-5, elementwise_affine=False)(x)
    torch.testing.assert_close(complete(CRMSNorm(7)(compress(x))), whole)


def test_crms_norm_refuses_bad_arguments():
    with pytest.raises(InputError, match="normalized_shape"):
        CRMSNorm(0)
    with pytest.raises(InputError, match="eps"):
        CRMSNorm(3, eps=-1.0)
