"""The endpoint of the tutorials, asked by many at once, answers as ``predict`` does."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora.likelihoods import MultipleChoice, SequenceClassification

pytest.importorskip("httpx", reason="needs fastapi and httpx")
testclient = pytest.importorskip("fastapi.testclient", reason="needs fastapi and httpx")

TEXTS = ["It froze.", "It thawed in the night.", "It rained."]
CHOICES = [["ice", "water"], ["water", "ice", "steam"], ["water", "ice"]]
CLASSES = ("cold", "warm", "wet")


def saved(folder, classifies):
    """An adapter, and its base and itself in the folder."""
    tokenizer = build_tokenizer(TEXTS, pad="<pad>")
    net = tiny.bert() if classifies else tiny.llama(max_position_embeddings=128)
    net.resize_token_embeddings(len(tokenizer))
    likelihood = SequenceClassification(classes=CLASSES) if classifies else MultipleChoice()
    options = {"target_modules": None, "likelihood": likelihood, "tokenizer": tokenizer}
    blora = tiny.shaken(tiny.adapted(net, **options), 0.2)
    for part in (net, tokenizer):
        part.save_pretrained(folder / "base")
    blora.save_pretrained(folder / "adapter")
    return blora


@pytest.mark.parametrize("num_samples", [0, 4])
@pytest.mark.parametrize("classifies", [True, False])
def test_many_at_once_get_what_predict_gives(classifies, num_samples, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tutorials")
    import serve

    blora = saved(tmp_path, classifies)
    batch, asked, names = TEXTS, {"texts": TEXTS}, [CLASSES] * 3
    if not classifies:
        names = asked["choices"] = CHOICES
        pairs = zip(TEXTS, CHOICES, strict=True)
        batch = [{"question": text, "choices": each, "label": 0} for text, each in pairs]
    torch.manual_seed(0)
    expected = blora.predict(batch, num_samples)
    threshold = expected.entropy.median().item()
    told = {"ADAPTER": tmp_path / "adapter", "BASE": tmp_path / "base"}
    told |= {"ABSTAIN_ABOVE": threshold, "NUM_SAMPLES": num_samples}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("BASE")
    with pytest.raises(SystemExit, match="set BASE to the folder"):
        serve.from_environment()
    monkeypatch.setenv("BASE", str(tmp_path / "base"))
    client = testclient.TestClient(serve.from_environment())
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(client.post, "/predict", json=asked) for _ in range(24)]
        answers = [future.result().json() for future in found]
    assert all(answer == answers[0] for answer in answers)
    for k, answer in enumerate(answers[0]):
        assert list(answer["probs"]) == list(names[k])
        assert list(answer["probs"].values()) == expected.probs[k, : len(names[k])].tolist()
        assert answer["class"] == names[k][expected.predictions[k]]
        assert answer["mutual_information"] == expected.mutual_information[k].item()
        assert answer["abstain"] == (expected.entropy[k].item() > threshold)
    assert sum(answer["abstain"] for answer in answers[0]) == 1
    assert client.post("/predict", json={"texts": []}).status_code == 422
