import pyro
import pytest


@pytest.fixture(params=["global store", "module-local"])
def parameter_store(request):
    """Both of Pyro's ways to keep parameters."""
    with pyro.settings.context(module_local_params=request.param == "module-local"):
        yield
