import re

import pytest

from pyro_blora.network import pretrained


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    """An adapter as ``train`` writes one, untrained."""
    from pyro_blora import BayesianLoRA, likelihoods, load_pretrained
    from pyro_blora.guides import MatrixNormal
    from pyro_blora.models import KroneckerInducing

    folder = tmp_path_factory.mktemp("adapter")
    net, _ = load_pretrained(str(model_dir))
    likelihood = likelihoods.CausalLM(num_data=1)
    wide = {"prior": KroneckerInducing(sigma=1.0), "guide": MatrixNormal(init_scale=0.1)}
    blora = BayesianLoRA(net, target_modules=["q_proj"], likelihood=likelihood, **wide)
    blora.save_pretrained(folder)
    return folder


@pytest.fixture
def generate(run, model_dir, adapter):
    def generate(*arguments):
        given = ["--model", model_dir, "--adapter", adapter, "--max-new-tokens", 4]
        return run("generate", *given, "--num-samples", 3, *arguments)

    return generate


def test_it_writes_text_its_scores_and_a_page(generate, tmp_path):
    html = tmp_path / "new" / "answer.html"
    code, text, err = generate(
        "Question: [red] <b>", "Which?", "--html", html, "--temperature", 0.7, "--by", "entropy"
    )
    assert code == 0, err
    assert "Question: [red] <b>" in text
    assert "Entropy, nats:" in text
    scores = re.findall(r"(\d+) tokens, mean log-probability (-[\d.]+), epistemic score", text)
    assert len(scores) == 2
    page = html.read_text("utf-8")
    assert "Question: [red] &lt;b&gt;" in page
    assert page.count("<article") == 2
    assert "the average of 3 draws, temperature 0.7, seed 0" in page
    again = generate("Question: [red] <b>", "Which?", "--temperature", 0.7, "--by", "entropy")[1]
    assert re.sub(r"[\d.]+ s\n", "", again) in re.sub(r"[\d.]+ s\n", "", text)


def test_it_abstains_above_the_threshold(generate):
    code, text, err = generate("Which word?", "--abstain-above", 0, "--num-beams", 2)
    assert code == 0, err
    assert "Abstains: the draws do not agree" in text
    assert "Abstains" not in generate("Which word?", "--abstain-above", 5)[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["  "], ["prompt is empty"]),
        (["a", "--html", "."], ["--html .", "is a folder"]),
        (["a", "--abstain-above", 0.1, "--num-samples", 1], ["--num-samples 1", "2 or more"]),
        (["a", "--adapter", "/nowhere"], ["/nowhere"]),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_read(generate, monkeypatch, arguments, told):
    monkeypatch.setattr(pretrained, "load_pretrained", lambda name: pytest.fail("it was read"))
    code, _, err = generate(*arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert [word for word in told if word not in err] == []


def test_a_chat_needs_a_template(generate):
    code, _, err = generate("Which?", "--chat")
    assert code == 2
    assert "no chat template" in err
