"""Generation under the posterior: ``generate`` of transformers, on the average of its draws."""

import copy
import inspect
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.utils import ModelOutput

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.adapter import in_mode
from pyro_blora.network.probes import runs_eagerly
from pyro_blora.posterior.guide import warn_of_a_point
from pyro_blora.posterior.posterior import Posterior
from pyro_blora.prediction import Prediction

# Options that do not run the network exactly once per token, and caches without rows per draw
_REFUSED = ["assistant_model", "prompt_lookup_num_tokens", "custom_generate", "guidance_scale"]
_REFUSED += ["assistant_early_exit", "use_mtp", "token_healing", "prefill_chunk_size", "cache"]
_REFUSED += ["past_key_values"]

By = Literal["mutual_information", "entropy"]

_GIVEN: Any = None  # ModelOutput requires a default for every field but the first


@dataclass
class Generation(ModelOutput):
    r"""Sequences generated from the average of S sampled models, and their uncertainty.

    Let :math:`p_s` be the distribution of the next token under a draw, before temperature,
    penalties and the like, and :math:`\bar p = \tfrac1S\sum_s p_s` the average. Then

    .. math::
        \texttt{entropy} = H[\bar p], \qquad
        \texttt{mutual\_information} = H[\bar p] - \tfrac1S\textstyle\sum_s H[p_s], \qquad
        \texttt{disagreement} = \tfrac1S\,\#\{s : \arg\max p_s \ne \arg\max \bar p\}

    ``N`` is the number of prompts times ``num_return_sequences``, and ``T`` the number of new
    tokens. Entries after the end of a sequence are NaN.

    Reference:
        A. Malinin and M. Gales (2021), "Uncertainty Estimation in Autoregressive Structured
        Prediction", arXiv:2002.07650.
    """

    sequences: Tensor  #: the prompts, if they were tokens, and the new tokens, ``(N, T_0 + T)``
    log_probs: Tensor = _GIVEN  #: :math:`\log\bar p` of each new token in nats, ``(N, T)``
    entropy: Tensor = _GIVEN  #: in nats, ``(N, T)``
    mutual_information: Tensor = _GIVEN  #: the entropy due to the posterior, nats, ``(N, T)``
    disagreement: Tensor = _GIVEN  #: between 0 and 1, ``(N, T)``
    mean_log_prob: Tensor = _GIVEN  #: mean of ``log_probs`` over the new tokens, ``(N,)``
    mean_entropy: Tensor = _GIVEN  #: mean of ``entropy`` likewise
    epistemic: Tensor = _GIVEN  #: mean of ``mutual_information`` likewise
    abstained: Tensor = _GIVEN  #: whether the score chosen by ``by`` is above the threshold


@torch.no_grad()
def generate(
    posterior: Posterior,
    input_ids: Tensor | None = None,
    num_samples: int | None = None,
    abstain_above: float | None = None,
    by: By = "mutual_information",
    **options: Any,
) -> Generation:
    r"""Generates text whose next token comes from the average of ``S`` posterior draws.

    .. math:: \bar p(y_t \mid y_{<t}) = \tfrac1S \textstyle\sum_s p(y_t \mid y_{<t}, U_s)

    The draws are the same for the whole text, dropout is off, and a prior's conditional noise is
    drawn anew in each pass. Temperature, ``top_p``, penalties and the like act on the logits
    :math:`\log \bar p + \tfrac1S \sum_s \log \sum_v e^{l_{sv}}` of the average; these are the
    logits of the network if all draws are alike.

    Args:
        posterior: the adapter's posterior.
        input_ids: the prompts' tokens, ``(B, T_0)``, on any device. Prompts of different lengths
            must be padded on the left and come with their ``attention_mask``.
        num_samples: number of draws ``S``; 0 uses the posterior mean. Default: as in
            ``predict``.
        abstain_above: threshold in nats per token, above which a sequence's score marks it as
            ``abstained``; :func:`~pyro_blora.evaluation.metrics.threshold_for` finds one. Default:
            no sequence abstains.
        by: the score, ``"entropy"`` (``mean_entropy``) or ``"mutual_information"``
            (``epistemic``). Entropy is high for every open text and needs no draws; mutual
            information is high only if the draws differ. Default: ``"mutual_information"``.
        options: options of ``transformers.GenerationMixin.generate``: ``max_new_tokens``,
            ``do_sample``, ``num_beams``, ``streamer``, ``generation_config``, ...
    """
    from transformers import GenerationMixin  # here, because its import sets warning filters

    model, num_samples = posterior.model, posterior.method.draws(num_samples)
    if num_samples:
        posterior.method.check_draws()
    model.check_attached()
    modules = model.net.modules()  # of which PEFT and torch.compile wrap the one that generates
    able: Any = (m for m in modules if isinstance(m, GenerationMixin) and m.can_generate())
    if (net := next(able, None)) is None:
        raise ConfigurationError(
            "generate needs a causal language model (AutoModelForCausalLM), got "
            f"{type(model.net).__name__}."
        )
    several_beams = (_setting(net, options, "num_beams") or 1) > 1
    if by not in get_args(By):
        names = " or ".join(map(repr, get_args(By)))
        raise ConfigurationError(f"by must be {names}, got {by!r}; entropy needs no draws.")
    if abstain_above is not None and by == "mutual_information" and num_samples < 2:
        raise ConfigurationError(
            f"num_samples must be 2 or more to compare draws, got {num_samples}; or by='entropy'."
        )
    for name in (*_REFUSED, *(["cache_implementation"] if several_beams else [])):
        if _setting(net, options, name) not in (None, False):
            raise ConfigurationError(
                f"generate takes no {name}: each token must be one pass under the same draws."
            )
    warn_of_a_point(posterior.guide, num_samples)
    device = model.groups[0].device
    input_ids = options.pop("inputs", input_ids)  # as transformers calls it, too
    if input_ids is not None:
        options["input_ids"] = input_ids
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    updates = posterior.pairs()(num_samples) if num_samples else posterior.mean()
    distilled = not num_samples and model.enabled and not model.likelihood.predicts
    temperature = float(model.mean_temperature) if distilled else 1.0
    average, ends = _Average(max(1, num_samples), temperature), _Ends()
    options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), ends]
    if several_beams and _setting(net, options, "use_cache") is not False:
        known = inspect.signature(type(net).forward).parameters
        key = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
        options[key] = _CacheOfDraws(average.draws, net.config)
    with ExitStack() as stack:
        stack.enter_context(in_mode(model.net, training=False))
        stack.enter_context(model.applied(updates))
        if not runs_eagerly(model.net.modules()):  # an existing graph has no hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(net.register_forward_pre_hook(average.repeated, with_kwargs=True))
        stack.enter_context(net.register_forward_hook(average.averaged))
        out = net.generate(**_with_logits(options))
    rows = getattr(out, "beam_indices", None)  # the row of each token, -1 after the end
    if rows is None:
        ended = torch.stack(ends.steps[: len(out.logits)], -1).long()
        here = torch.arange(len(ended), device=ended.device).unsqueeze(-1)
        rows = here.where(ended.cumsum(-1) == ended, -1)  # up to and including the first end
    return _measured(out, average.steps, rows, abstain_above, by)


class _Average:
    """Hooks that repeat inputs, average the logits of ``draws`` models, record uncertainties."""

    def __init__(self, draws: int, temperature: float) -> None:
        self.draws, self.temperature = draws, temperature
        self.steps: list[Tensor] = []  # entropy, mutual information, disagreement: (3, R)

    def repeated(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Repeats all rows for the first draw, then for the second, as the updates expect them."""
        given = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        rows = next(len(value) for value in given if value is not None)

        def repeated(value: Any) -> Any:
            if isinstance(value, dict):  # masks by the kind of attention
                return {kind: repeated(mask) for kind, mask in value.items()}
            if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != rows:
                return value
            return value.repeat(self.draws, *(1,) * (value.dim() - 1))

        return args, {name: repeated(value) for name, value in kwargs.items()}

    def averaged(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits = output.logits[:, -1].float().unflatten(0, (self.draws, -1))  # S x R x V
        if self.temperature != 1:
            logits = logits / self.temperature
        log_probs = logits.log_softmax(-1)
        level = logits.logsumexp(-1, keepdim=True).mean(0)
        output.logits = (log_probs.logsumexp(0) - math.log(self.draws) + level).unsqueeze(1)
        now = Prediction(log_probs.exp())
        differ = (now.samples.argmax(-1) != now.predictions).float().mean(0)
        self.steps.append(torch.stack([now.entropy, now.mutual_information, differ]))
        return output


class _Ends(StoppingCriteria):
    """The last criterion, which ends no row but records the rows that the others have ended."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []  # one bool per row, (R,), for each pass

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> "_Ends":
        return self

    # transformers does not expose what it joins by ``ended | criterion(...)``
    def __ror__(self, ended: Tensor) -> Tensor:
        self.steps.append(ended)
        return ended


class _CacheOfDraws(DynamicCache):
    """A cache with the rows of all beams for the first draw, then for the second, and so on."""

    def __init__(self, draws: int, config: Any) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        self.draws = draws

    def reorder_cache(self, beam_idx: Tensor) -> None:
        starts = torch.arange(self.draws, device=beam_idx.device) * len(beam_idx)
        super().reorder_cache((starts.unsqueeze(-1) + beam_idx).flatten())


def _setting(net: Any, options: Mapping[str, Any], name: str) -> Any:
    """The value of an option as transformers resolves it, or ``None`` if it is not set."""
    if name in options:
        return options[name]
    configs = (options.get("generation_config"), net.generation_config)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _with_logits(options: dict[str, Any]) -> dict[str, Any]:
    """Options with which ``generate`` also returns the logits and the row of each token."""
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    if options.get("generation_config") is None:
        return {**options, **wanted}
    config = copy.deepcopy(options["generation_config"])  # then other options are not allowed
    config.update(**wanted)
    return {**options, "generation_config": config}


def _measured(
    out: Any, steps: list[Tensor], rows: Tensor, abstain_above: float | None, by: str
) -> Generation:
    """Collects the recorded uncertainty of each new token from the row that it came from."""
    is_new, rows = rows >= 0, rows.clamp_min(0)
    length = rows.shape[1]
    tokens = out.sequences[:, -length:]
    log_probs = [
        step.log_softmax(-1)[row, token]
        for step, row, token in zip(out.logits, rows.unbind(-1), tokens.unbind(-1), strict=False)
    ]
    recorded = torch.stack(steps)[torch.arange(length, device=rows.device), :, rows]  # N x T x 3
    values = torch.cat([torch.stack(log_probs, -1).unsqueeze(-1), recorded], -1)
    values = values.masked_fill(~is_new.unsqueeze(-1), math.nan)
    means = values.nanmean(1).unbind(-1)[:3]  # log-probability, entropy, mutual information
    score = means[1 if by == "entropy" else 2]
    abstained = score > (math.inf if abstain_above is None else abstain_above)
    return Generation(out.sequences, *values.unbind(-1), *means, abstained)
