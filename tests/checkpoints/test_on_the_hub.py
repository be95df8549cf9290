"""The base by its name, the model card, and the hub, for which a folder stands in."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, checkpoints
from pyro_blora.checkpoints import checkpoint
from pyro_blora.errors import CheckpointError
from pyro_blora.likelihoods import SequenceClassification

CARD = "README.md"


def net(kind=tiny.llama, name="me/my-base"):
    torch.manual_seed(0)
    made = kind(1)
    made.config.name_or_path = name
    return made


@pytest.fixture
def loads(monkeypatch):
    calls = []

    def load(name, *, num_labels, dtype, head):
        calls.append((name, num_labels, dtype))
        return net(tiny.llama if num_labels is None else tiny.bert).to(dtype)

    monkeypatch.setattr(checkpoint, "load_network", load)
    return calls


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def upload(*, repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def download(repo_id, *, allow_patterns):
        if not (tmp_path / "hub" / repo_id).exists():
            raise OSError("404 Not Found\nmore lines")
        return str(tmp_path / "hub" / repo_id)

    create = lambda repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}")  # noqa: E731
    api = SimpleNamespace(create_repo=create, upload_folder=upload)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "hub"


def test_the_base_is_loaded_by_its_name(loads, tmp_path):
    blora = tiny.adapted(net())
    expected = blora.predict(tiny.sequences(), 0).probs
    blora.save_pretrained(tmp_path)
    for place in ({"folder": tmp_path}, {"net": str(tmp_path)}):
        read = BayesianLoRA.from_pretrained(**place)
        assert torch.equal(read.predict(tiny.sequences(), 0).probs, expected)
    likelihood = SequenceClassification(num_data=12)
    blora = tiny.adapted(net(tiny.bert).bfloat16(), target_modules=["query"], likelihood=likelihood)
    blora.save_pretrained(tmp_path)
    assert type(BayesianLoRA.from_pretrained(tmp_path).net) is type(blora.net)
    base = ("me/my-base", None, torch.float32)
    assert loads == [base, base, ("me/my-base", 3, torch.bfloat16)]
    tiny.adapted(net(name="/home/user/base")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no name on the hub"):
        BayesianLoRA.from_pretrained(tmp_path)


@pytest.mark.usefixtures("loads")
def test_pushed_and_read_by_its_id(hub):
    blora = tiny.adapted(net())
    expected = blora.predict(tiny.sequences(), 0).probs
    url = blora.push_to_hub("my-adapter", private=True, notes={"accuracy": 0.5})
    assert url == "https://hub/me/my-adapter"
    names = {CARD, checkpoints.CONFIG, checkpoints.WEIGHTS}
    assert tiny.written(hub / "me" / "my-adapter") == names
    read = BayesianLoRA.from_pretrained("me/my-adapter")
    assert torch.equal(read.predict(tiny.sequences(), 0).probs, expected)
    assert "| accuracy | 0.5 |" in (hub / "me" / "my-adapter" / CARD).read_text()
    for name in ("me/none", "nowhere"):
        with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
            BayesianLoRA.from_pretrained(name)


def test_the_card_says_what_was_trained_and_a_page_of_the_user_stays(tmp_path):
    blora = tiny.adapted(net(), num_data=10)
    result = tiny.train(blora, num_steps=4, validation=tiny.examples(4), validate_every=2)
    blora.save_pretrained(tmp_path)
    blora.save_pretrained(tmp_path, result=result, notes={"task": "a | b", "steps": 9})
    text = (tmp_path / CARD).read_text()
    assert huggingface_hub.ModelCard(text).data.to_dict()["base_model"] == "me/my-base"
    (tmp_path / CARD).write_text("mine")
    blora.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
