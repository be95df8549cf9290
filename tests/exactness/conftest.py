import pytest
import torch


@pytest.fixture(autouse=True)
def _double(_clean_pyro):
    """Double precision, so that algebra agrees to its last digits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
