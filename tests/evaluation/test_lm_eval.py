"""The model of lm-evaluation-harness that the page on evaluation shows."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora.guides import MatrixNormal

PAGE = Path(__file__).resolve().parents[2] / "docs/evaluation.md"
TEXTS = ["red green blue", "cold warm", "a round red stone is cold", "green is not blue"]
PAIRS = [("a round", " red stone"), ("green is not", " blue"), ("red", " green blue cold warm")]
pytest.importorskip("lm_eval")


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_continuation_has_the_mean_probability_over_the_draws():
    from lm_eval.api.instance import Instance

    tokenizer = build_tokenizer(TEXTS, bos="<s>", pad="<pad>")
    tokenizer.eos_token = "<s>"  # which it does not put after a text
    net = tiny.llama(vocab_size=len(tokenizer))
    blora = tiny.adapted(net, guide=MatrixNormal(init_scale=3.0))  # wide enough to see
    section = PAGE.read_text("utf-8").split("## lm-evaluation-harness")[1]
    names = {"blora": blora}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], names)
    lm = names["PosteriorLM"](net, tokenizer=tokenizer, batch_size=2)
    torch.manual_seed(0)
    drawn = [blora.posterior.draws(1) for _ in range(10)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    torch.manual_seed(0)
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    gaps = []
    for (score, greedy), (context, more) in zip(answers, PAIRS, strict=True):
        whole = torch.tensor([tokenizer(context + more)["input_ids"]])
        scored = whole.shape[1] - len(tokenizer(context)["input_ids"])
        logps = []
        for updates in drawn:
            with blora.model.applied(updates), torch.no_grad():
                logps.append(net(whole).logits[0].log_softmax(-1)[-scored - 1 : -1])
        best = sum(bool((logp.argmax(-1) == whole[0, -scored:]).all()) for logp in logps)
        assert best == 5 or greedy == (best > 5)
        each = torch.stack([p.gather(1, whole[0, -scored:, None]).sum() for p in logps])
        assert score == pytest.approx(float(each.exp().mean().log()), abs=1e-4)
        gaps.append(abs(score - float(each.mean())))
    assert max(gaps) > 1e-2
