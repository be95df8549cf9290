"""The tasks of EleutherAI's lm-evaluation-harness under the posterior predictive."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods.reading import logits_at, output_head
from pyro_blora.network.adapter import in_mode
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.posterior.guide import warn_of_a_point
from pyro_blora.posterior.posterior import Samples
from pyro_blora.updates import LowRankUpdate

try:
    from lm_eval.models.huggingface import HFLM
except ImportError:
    HFLM = None

# The input tokens of a request, and the number of scored tokens, which follow the last inputs
_Row = tuple[tuple[int, ...], int]


class PosteriorLM(HFLM or object):  # type: ignore[misc]
    r"""A model of the harness that scores a continuation by its posterior predictive.

    .. math::

        \log p(y \mid x) = \log \frac1S \sum_s \prod_t p(y_t \mid x, y_{<t}, U_s)

    The same ``S`` draws score every request, so that the options of an item are compared under the
    same draws. A continuation is greedy if each of its tokens is the most probable one under
    :math:`p(y_t \mid x, y_{<t}) \propto \sum_s p(y_{<t} \mid x, U_s)\, p(y_t \mid x, y_{<t}, U_s)`.
    Windows of a long text (``loglikelihood_rolling``) are scored one by one and added up. Text
    (``generate_until``) is written by the posterior mean.

    ``num_samples`` and ``samples`` are as in :meth:`BayesianLoRA.predict
    <pyro_blora.BayesianLoRA.predict>`; ``options`` are those of
    ``lm_eval.models.huggingface.HFLM``: ``max_length``, ``add_bos_token``, ....
    """

    @one_at_a_time
    def __init__(
        self,
        blora: BayesianLoRA,
        tokenizer: Any,
        *,
        num_samples: int = 10,
        samples: Samples | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        if HFLM is None:
            raise ConfigurationError("PosteriorLM needs the package lm_eval; install it by pip.")
        output_head(blora.net)
        if getattr(blora.guide, "reads_context", False):
            raise ConfigurationError(
                f"{blora.method.guide!r} has no draws for all requests; take another guide."
            )
        if samples is None and num_samples:
            blora.method.check_draws()
        super().__init__(
            blora.net, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **options
        )
        self.blora = blora
        posterior = blora.posterior
        if samples is not None:
            num_samples, draw = posterior.given(samples)
        else:
            warn_of_a_point(blora.guide, num_samples)
            draw = posterior.pairs()
        self.draws = [draw(1) for _ in range(num_samples)] or [posterior.mean()]

    def generate_until(self, *arguments: Any, **options: Any) -> Any:
        """Text by the network under the posterior mean; see ``HFLM``."""
        with self.blora.posterior():
            return super().generate_until(*arguments, **options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        rows: dict[_Row, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            read = (context + continuation)[-self.max_length - 1 : -1]
            rows[tuple(read), len(continuation)].append(index)
        longest = sorted(rows, key=lambda row: -len(row[0]))  # first, to run out of memory early
        size = override_bs or self.batch_size
        answers: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(longest), size), desc="posterior", disable=disable_tqdm):
            batch = longest[start : start + size]
            for row, joint in zip(batch, self._joint(batch), strict=True):
                best = joint.argmax(-1).tolist()
                for index in rows[row]:
                    text, _, continuation = requests[index]
                    score = float(joint[-1, continuation[-1]])
                    answers[index] = score, best == list(continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    @one_at_a_time
    @torch.no_grad()
    def _joint(self, rows: Sequence[_Row]) -> Sequence[Tensor]:
        """``log p(y_1 ... y_{t-1}, v | x)`` for every token ``v``, ``(n, V)`` for each row."""
        texts, counts = [torch.tensor(text) for text, _ in rows], [count for _, count in rows]
        spans = [torch.arange(len(t) - n, len(t)) for t, n in zip(texts, counts, strict=True)]
        ones = [[torch.ones_like(part) for part in parts] for parts in (texts, spans)]
        inputs, positions, attended, real = (
            pad_sequence(parts, batch_first=True).to(self.device) for parts in (texts, spans, *ones)
        )
        batch = {"input_ids": inputs, "attention_mask": attended}
        # the token after each position; after the last position of a row it is not used
        following = inputs.gather(1, (positions + 1).clamp(max=inputs.shape[1] - 1))
        index = following[real.bool()][:, None]
        low = self.mixed_precision_dtype

        def scores(updates: dict[str, LowRankUpdate]) -> Tensor:
            with (
                in_mode(self.blora.net, training=False),
                torch.autocast(self.device.type, low, enabled=low is not None),
                self.blora.model.applied(updates) as net,
            ):
                logp = logits_at(
                    net, batch, positions, real.bool(), narrow=self.blora.likelihood.shortcuts.on
                ).log_softmax(-1)
            each = logp.gather(1, index).squeeze(1)
            before = torch.cat([part.cumsum(0) - part for part in each.split(counts)])
            return before[:, None] + logp

        total = functools.reduce(torch.logaddexp, map(scores, self.draws))
        return (total - total.new_tensor(len(self.draws)).log()).split(counts)
