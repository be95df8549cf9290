import pyro
import pytest


@pytest.fixture(autouse=True)
def _clean_pyro():
    """Each test starts from an empty parameter store, one seed, and Pyro's checks."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
