"""How the command starts."""

import pytest

from pyro_blora import pretrained
from pyro_blora.errors import ConfigurationError


@pytest.mark.parametrize("load", [pretrained.load_pretrained, pretrained.shape_only])
def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch, load):
    import huggingface_hub

    asked = []

    def metadata(url):
        asked.append(url)
        raise ConnectionError("no such host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigurationError, match=r"no folder .*no such host.*smollm2"):
        load("some/nme")
    assert len(asked) == 1
