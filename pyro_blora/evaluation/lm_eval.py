"""The tasks of EleutherAI's lm-evaluation-harness under the posterior predictive."""

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
from pyro_blora.posterior.predictive import Samples, draws_given, draws_in_pairs, sample_updates

try:
    from lm_eval.models.huggingface import HFLM
except ImportError:
    HFLM = None

# What a request asks for: the tokens read, and how many of the last ones with one more are scored
_Row = tuple[tuple[int, ...], int]


class PosteriorLM(HFLM or object):  # type: ignore[misc]
    r"""A model of the harness that scores a continuation by its posterior predictive.

    .. math::

        \log p(y \mid x) = \log \frac1S \sum_s \prod_t p(y_t \mid x, y_{<t}, U_s)

    The same ``S`` models score every request, so that the options of an item are compared under the
    same draws. A continuation is greedy where each of its tokens is the most probable one under
    :math:`p(y_t \mid x, y_{<t}) \propto \sum_s p(y_{<t} \mid x, U_s)\, p(y_t \mid x, y_{<t}, U_s)`.
    Windows of a long text (``loglikelihood_rolling``) are scored one by one and added up. Text
    (``generate_until``) is written by the posterior mean.

    ``num_samples`` and ``samples`` are as in :meth:`BayesianLoRA.predict
    <pyro_blora.BayesianLoRA.predict>`, and ``options`` those of
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
            raise ConfigurationError(
                "PosteriorLM needs lm-evaluation-harness: pip install lm_eval."
            )
        output_head(blora.net)
        if getattr(blora.guide, "reads_context", False):
            raise ConfigurationError(
                f"{blora.guide_family!r} has another posterior for every batch, and a task is "
                "scored under the same draws throughout; take a guide that is not amortized."
            )
        if samples is None and num_samples:
            blora.check_draws()
        super().__init__(
            blora.net, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **options
        )
        self.blora = blora
        if samples is not None:
            num_samples, draw = draws_given(blora.model, samples)
        else:
            warn_of_a_point(blora.model, blora.guide, num_samples)
            draw = draws_in_pairs(blora.model, blora.guide)
        self.draws = [draw(1) for _ in range(num_samples)]
        if not num_samples:
            self.draws = [sample_updates(blora.model, blora.guide, 0)]

    def generate_until(self, *arguments: Any, **options: Any) -> Any:
        """As everywhere, by the network under the posterior mean."""
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
        longest = sorted(rows, key=lambda row: -len(row[0]))  # first, so that memory fails at once
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
        """``log p(y_1 ... y_{t-1}, v | x)`` for every token ``v``, ``(n, V)`` of each row."""
        texts = [torch.tensor(text, device=self.device) for text, _ in rows]
        inputs = pad_sequence(texts, batch_first=True)
        masks = [torch.ones_like(text) for text in texts]
        counts = torch.tensor([count for _, count in rows], device=self.device)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        steps = torch.arange(int(counts.max()), device=self.device)
        real = steps < counts[:, None]
        last = inputs.shape[1] - 1
        positions = ((lengths - counts)[:, None] + steps).clamp(max=last)
        following = (positions + 1).clamp(max=last)  # after a row's last one nothing is weighed
        targets = inputs.gather(1, following)[real]
        batch = {"input_ids": inputs, "attention_mask": pad_sequence(masks, batch_first=True)}
        low = self.mixed_precision_dtype
        total = None
        for updates in self.draws:
            with (
                in_mode(self.blora.net, training=False),
                torch.autocast(self.device.type, low, enabled=low is not None),
                self.blora.model.applied(updates) as net,
            ):
                logp = logits_at(
                    net, batch, positions, real, narrow=self.blora.likelihood.shortcuts.on
                ).log_softmax(-1)
            each = logp.gather(1, targets[:, None]).squeeze(1)
            grid = logp.new_zeros(real.shape).masked_scatter(real, each)
            before = (grid.cumsum(1) - grid)[real]
            scores = before[:, None] + logp
            total = scores if total is None else torch.logaddexp(total, scores)
        assert total is not None
        mean = total - torch.tensor(len(self.draws), device=self.device).log()
        return mean.split(counts.tolist())
