import pyro
import pytest


@pytest.fixture(autouse=True)
def _clean_pyro(monkeypatch):
    """Each test starts from an empty parameter store, one seed, and Pyro's checks.

    ``precision="auto"`` is float32 for it, so that no figure depends on the machine.
    """
    monkeypatch.setattr("pyro_blora.network.pretrained._bfloat16_pays", lambda kind: False)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()


@pytest.fixture(params=["global store", "module-local"])
def parameter_store(request):
    """Both of Pyro's ways to keep parameters."""
    with pyro.settings.context(module_local_params=request.param == "module-local"):
        yield
