"""The harness's own tasks and requests under the posterior predictive."""

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora.evaluation import lm_eval as adapter
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import CausalLM

TEXTS = ["red green blue", "cold warm", "a round red stone is cold", "green is not blue"]
PAIRS = [
    *(("a round", f" {word}") for word in ("red stone", "blue", "green")),
    ("", "cold warm"),
    ("green is not", " blue"),
    ("red", " green blue cold warm a round red stone is"),
]
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer(TEXTS, bos="<s>", pad="<pad>")
    tokenizer.eos_token = "<s>"  # which it does not put after a text
    return tokenizer


@pytest.fixture(params=[{}, {"likelihood": CausalLM(num_data=4)}], ids=["labels", "text"])
def blora(request, tokenizer):
    """A posterior wide enough to see, of CausalLM or of a likelihood of another kind."""
    net = tiny.llama(vocab_size=len(tokenizer))
    return tiny.adapted(net, guide=MatrixNormal(init_scale=3.0), **request.param)


def answers_of(lm, kind, pairs):
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


@torch.no_grad()
def by_hand(blora, draws, whole, scored):
    """Log-probabilities of the scored tokens and of all others there, ``(S, n, V)``."""
    each = []
    for updates in draws:
        with blora.model.applied(updates) as net:
            logits = net(torch.tensor([whole])).logits[0]
        each.append(logits.log_softmax(-1)[-scored - 1 : -1])
    return torch.stack(each)


@pytest.mark.parametrize(("batch_size", "given"), [(1, False), (4, True)])
def test_a_continuation_has_the_mean_probability_over_the_draws(
    blora, tokenizer, batch_size, given
):
    samples = {s.name: s.prior.sample((4,)).detach() for s in blora.model.sites} if given else None
    options = {"num_samples": 4, "batch_size": batch_size, "samples": samples}
    lm = adapter.PosteriorLM(blora, tokenizer, **options)
    gaps = []
    for (score, greedy), (context, more) in zip(
        answers_of(lm, "loglikelihood", PAIRS), PAIRS, strict=True
    ):
        whole = tokenizer(context + more)["input_ids"]
        scored = len(whole) - (len(tokenizer(context)["input_ids"]) if context else 1)
        logp = by_hand(blora, lm.draws, whole, scored)
        target = torch.tensor(whole[-scored:])
        each = logp.gather(2, target.expand(4, -1)[..., None]).squeeze(2)
        assert score == pytest.approx(float(each.sum(1).exp().mean().log()), abs=1e-4)
        gaps.append(abs(score - float(each.exp().mean(0).log().sum())))
        best, weights = [], torch.ones(4)  # p(y_<t | U_s)
        for step in range(scored):
            best.append(int((weights[:, None] * logp[:, step].exp()).sum(0).argmax()))
            weights = weights * each[:, step].exp()
        assert greedy == (best == target.tolist())
    assert max(gaps) > 1e-3  # from the product of the tokens' own averages


def test_the_mean_is_what_the_harness_gives_for_the_network_under_it(blora, tokenizer):
    from lm_eval.models.huggingface import HFLM

    with torch.no_grad():
        for family in blora.guide.families().values():
            family.loc.normal_()
    plain = HFLM(blora.net, tokenizer=tokenizer, batch_size=2)
    lm = adapter.PosteriorLM(blora, tokenizer, num_samples=0, batch_size=2)
    long = (" ".join(TEXTS * 3),)
    assert len(tokenizer(*long)["input_ids"]) > plain.max_length
    until = ("a round", {"until": ["."], "max_gen_toks": 5, "do_sample": False})
    scored = {"loglikelihood": [*PAIRS, (*long, " blue")], "loglikelihood_rolling": [long]}
    for kind, given in {**scored, "generate_until": [until]}.items():
        with blora.posterior():
            expected = answers_of(plain, kind, given)
        for a, b in zip(answers_of(lm, kind, given), expected, strict=True):
            assert a == (b if kind == "generate_until" else pytest.approx(b, abs=1e-3))
    base, mean = (
        [score for score, _ in answers_of(model, "loglikelihood", PAIRS)] for model in (plain, lm)
    )
    assert base != pytest.approx(mean, abs=1e-2)
