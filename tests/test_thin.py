"""Products with few columns, in the forms that they are computed in."""

from __future__ import annotations

import pytest
import torch

from graftwork.fast import thin


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("rows", [1, 255, 256, 513, 520, 1024])
@pytest.mark.parametrize("n", [48, 512, 515])
@pytest.mark.parametrize("r", [1, 4, 8, 15, 16, 40])
def test_the_products(
    mkl: bool, rows: int, n: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin, "MKL", mkl)
    x, m, s = torch.randn(rows, n), torch.randn(n, r), torch.randn(rows, r)
    for own in (x, torch.randn(n, rows).t(), x.double()):  # contiguous, transposed, another dtype
        for factor in (m, torch.randn(r, n).t()):
            wanted = own.double() @ factor.double()
            found = thin.narrow(own, factor.to(own.dtype))
            assert found.is_contiguous() and found.dtype == own.dtype
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * n**0.5)
        wanted = s.double().t() @ own.double()
        found = thin.across(s.to(own.dtype), own)
        assert found.is_contiguous() and found.dtype == own.dtype
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * rows**0.5)


def test_other_forms_are_for_mkl_and_single_precision_alone() -> None:
    x, m = torch.randn(1024, 512), torch.randn(512, 8)
    seen: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            seen.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    for dtype, few in ((torch.float32, thin.MKL), (torch.float64, False), (torch.bfloat16, False)):
        seen.clear()
        with Names():
            thin.narrow(x.to(dtype), m.to(dtype))
            thin.across(x[:, :8].to(dtype), x.to(dtype))
        assert seen.count("bmm") == (2 if few else 0), dtype
