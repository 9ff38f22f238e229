"""Every test runs on one thread; memory that torch.empty hands out is poisoned, so that nothing reads what it did not write."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its relatives return NaN, or 0xAB in integer tensors."""

    def poison(make):
        def wrapped(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype.is_floating_point and out.dtype.itemsize > 1:
                out.detach().fill_(torch.nan)
            elif out.dtype not in (torch.bool, torch.float8_e4m3fn) and not out.is_complex():
                out.fill_(0x2B)
            return out

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
