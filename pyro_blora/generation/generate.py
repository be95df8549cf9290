"""Generation under the posterior: transformers' ``generate``, on the average of S sampled models.

Two hooks make the network that average: what goes into a pass is repeated, so that each draw has
rows (and a key-value cache) of its own, and the logits that come out are averaged to one row again.
So greedy, sampling, beams, streamers, processors and stopping criteria are transformers' own.
"""

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
from pyro_blora.likelihoods import CausalLM
from pyro_blora.network.adapter import in_mode
from pyro_blora.network.shortcuts import runs_eagerly
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import warn_of_a_point
from pyro_blora.posterior.prediction import Prediction
from pyro_blora.posterior.predictive import draws_in_pairs, sample_updates

_REFUSED = (  # the first five run the network other than once for each token
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "guidance_scale",
    "prefill_chunk_size",
    "cache",
    "past_key_values",
)

By = Literal["mutual_information", "entropy"]

_GIVEN: Any = None  # the default that ModelOutput wants of every field but the first


@dataclass
class Generation(ModelOutput):
    r"""Sequences whose tokens come from the average of S sampled models, with its uncertainty.

    Of the distributions :math:`p_s` of the next token under the draws, and their average
    :math:`\bar p = \tfrac1S\sum_s p_s`, as they are before temperature, penalties and the like:

    .. math::
        \texttt{entropy} = H[\bar p], \qquad
        \texttt{mutual\_information} = H[\bar p] - \tfrac1S\textstyle\sum_s H[p_s], \qquad
        \texttt{disagreement} = \tfrac1S\,\#\{s : \arg\max p_s \ne \arg\max \bar p\}

    ``N`` is the number of prompts times ``num_return_sequences``, ``T`` that of the new tokens;
    where a sequence has ended before, its entries are NaN.

    Attributes:
        sequences: the prompts, if they were tokens, and what follows; ``(N, T_0 + T)``.
        log_probs: :math:`\log\bar p` of each new token, in nats, ``(N, T)``.
        entropy: in nats, ``(N, T)``.
        mutual_information: in nats, ``(N, T)``: what is due to the weights' posterior.
        disagreement: between 0 and 1, ``(N, T)``.
        mean_log_prob: mean of ``log_probs`` over a sequence's tokens, in nats a token, ``(N,)``.
        mean_entropy: mean of ``entropy`` over them, in nats a token, ``(N,)``.
        epistemic: mean of ``mutual_information`` over them, in nats a token, ``(N,)``.
        abstained: whether the score that ``by`` names is above the threshold, ``(N,)``.

    Reference:
        A. Malinin and M. Gales (2021), "Uncertainty Estimation in Autoregressive Structured
        Prediction", arXiv:2002.07650.
    """

    sequences: Tensor
    log_probs: Tensor = _GIVEN
    entropy: Tensor = _GIVEN
    mutual_information: Tensor = _GIVEN
    disagreement: Tensor = _GIVEN
    mean_log_prob: Tensor = _GIVEN
    mean_entropy: Tensor = _GIVEN
    epistemic: Tensor = _GIVEN
    abstained: Tensor = _GIVEN


@torch.no_grad()
def generate(
    model: BayesianLoRAModel,
    guide: nn.Module,
    input_ids: Tensor | None = None,
    num_samples: int = 10,
    abstain_above: float | None = None,
    by: By = "mutual_information",
    **options: Any,
) -> Generation:
    r"""Text whose next token comes from the average of ``S`` posterior draws.

    .. math:: \bar p(y_t \mid y_{<t}) = \tfrac1S \textstyle\sum_s p(y_t \mid y_{<t}, U_s)

    The draws are held fixed for the whole text. Temperature, ``top_p``, penalties and the like act
    on the average, given as logits at the mean level of the draws' own
    (:math:`\log \bar p + \tfrac1S \sum_s \log \sum_v e^{l_{sv}}`). If all draws are alike, these
    are the network's own logits. Dropout is off. A prior's conditional noise is drawn anew in each
    pass.

    Args:
        model: the model.
        guide: its guide.
        input_ids: the prompts' tokens, ``(B, T_0)``, on any device. Prompts of several lengths are
            padded on the left and come with their ``attention_mask``.
        num_samples: number of draws ``S``; 0 is the posterior mean. Default: 10.
        abstain_above: threshold in nats a token; a sequence whose score is greater has
            ``abstained``. Default: no sequence abstains.
        by: the score: ``"entropy"`` is ``mean_entropy``, ``"mutual_information"`` is
            ``epistemic``. Entropy is high for every open text and needs no draws; mutual
            information is high only if the draws differ. Default: ``"mutual_information"``.
        options: those of ``transformers.GenerationMixin.generate``: ``max_new_tokens``,
            ``do_sample``, ``num_beams``, ``streamer``, ``generation_config``, ...
    """
    model.check_on_network()
    net = _generator(model.net)
    if input_ids is not None and not isinstance(input_ids, Tensor):
        raise ConfigurationError(
            f"input_ids must be a tensor of tokens, got a {type(input_ids).__name__}; write "
            "generate(**tokenizer(text, return_tensors='pt'))."
        )
    _check(net, num_samples, abstain_above, by, options)
    warn_of_a_point(model, guide, num_samples)
    device = model.groups[0].device
    input_ids = options.pop("inputs", input_ids)  # as transformers calls it, too
    if input_ids is not None:
        options["input_ids"] = input_ids
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    names = ("input_ids", "attention_mask")
    prompt = {name: options[name] for name in names if options.get(name) is not None}
    if num_samples:
        updates = draws_in_pairs(model, guide, prompt)(num_samples)
    else:
        updates = sample_updates(model, guide, 0, prompt)
    distilled = not num_samples and model.enabled and isinstance(model.likelihood, CausalLM)
    temperature = float(model.temperature) if distilled else 1.0
    average, ends = _Average(max(1, num_samples), temperature), _Ends()
    options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), ends]
    if _setting(net, options, "num_beams", 1) > 1 and _setting(net, options, "use_cache", True):
        known = inspect.signature(type(net).forward).parameters
        name = "cache" if "cache" in known else "past_key_values"  # of older transformers
        options[name] = _CacheOfDraws(average.draws, net.config)
    with ExitStack() as stack:
        stack.enter_context(in_mode(model.net, training=False))
        stack.enter_context(model.applied(updates))
        if not runs_eagerly(model.net.modules()):  # a graph made before has no hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(net.register_forward_pre_hook(average.repeated, with_kwargs=True))
        stack.enter_context(net.register_forward_hook(average.averaged))
        out = net.generate(**_telling_all(options))
    rows = getattr(out, "beam_indices", None)  # of each token the row it was picked from, or -1
    if rows is None:
        ended = torch.stack(ends.steps[: len(out.logits)], -1).long()
        here = torch.arange(len(ended), device=ended.device).unsqueeze(-1)
        rows = here.where(ended.cumsum(-1) == ended, -1)  # up to the first end, and that itself
    return _measured(out, average.steps, rows, abstain_above, by)


class _Average:
    """Hooks that make a network the average of ``draws`` sampled ones, and note how they differ."""

    def __init__(self, draws: int, temperature: float) -> None:
        self.draws, self.temperature = draws, temperature
        self.steps: list[Tensor] = []  # entropy, mutual information and disagreement, (3, R)

    def repeated(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All rows of the first draw, then all of the second, as updates share them out."""
        given = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        rows = next(len(value) for value in given if value is not None)

        def repeated(value: Any) -> Any:
            if isinstance(value, dict):  # masks of several kinds of attention
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
    """The last of the criteria, which ends no row and notes which those before it have ended."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []  # their answer after each pass, (R,)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> "_Ends":
        return self

    def __ror__(self, ended: Tensor) -> Tensor:  # transformers: ended | criterion(...)
        self.steps.append(ended)
        return ended


class _CacheOfDraws(DynamicCache):
    """A cache whose rows are the beams of the first draw, then of the second, and so on."""

    def __init__(self, draws: int, config: Any) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        self.draws = draws

    def reorder_cache(self, beam_idx: Tensor) -> None:
        starts = torch.arange(self.draws, device=beam_idx.device) * len(beam_idx)
        super().reorder_cache((starts.unsqueeze(-1) + beam_idx).flatten())


def _generator(net: nn.Module) -> Any:
    """The module that generates: ``net``, or what it wraps (PEFT, a compiled module)."""
    from transformers import GenerationMixin  # whose import sets filters of warnings

    for module in net.modules():
        if isinstance(module, GenerationMixin) and module.can_generate():
            return module
    raise ConfigurationError(
        f"{type(net).__name__} is no causal language model, which generate needs; load it with "
        "AutoModelForCausalLM."
    )


def _check(
    net: Any,
    num_samples: int,
    abstain_above: float | None,
    by: str,
    options: Mapping[str, Any],
) -> None:
    if by not in get_args(By):
        known = " or ".join(map(repr, get_args(By)))
        raise ConfigurationError(f"by must be {known}, got {by!r}; entropy needs no draws.")
    if abstain_above is not None and by == "mutual_information" and num_samples < 2:
        raise ConfigurationError(
            f"num_samples must be 2 or more, got {num_samples}: abstain_above={abstain_above} "
            "compares draws. Or pass by='entropy'."
        )
    beams = _setting(net, options, "num_beams", 1) > 1  # whose draws have a cache of their own
    for name in (*_REFUSED, *(["cache_implementation"] if beams else [])):
        if _setting(net, options, name, None) not in (None, False):
            raise ConfigurationError(
                f"generate takes no {name}: each token is one pass of draws of this call's own. "
                "Leave it out."
            )


def _setting(net: Any, options: Mapping[str, Any], name: str, default: Any) -> Any:
    """An option's value as ``generate`` finds it, or ``default`` for none."""
    configs = (options.get("generation_config"), net.generation_config)
    found = [getattr(config, name, None) for config in configs]
    found = [options[name]] if name in options else found
    return next((value for value in found if value is not None), default)


def _telling_all(options: dict[str, Any]) -> dict[str, Any]:
    """So that what was averaged is returned with the tokens, and the row that each came from."""
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    if options.get("generation_config") is None:
        return {**options, **wanted}
    config = copy.deepcopy(options["generation_config"])  # transformers wants all in one place
    config.update(**wanted)
    return {**options, "generation_config": config}


def _measured(
    out: Any, steps: list[Tensor], rows: Tensor, abstain_above: float | None, by: str
) -> Generation:
    """The uncertainty of each new token, from what was noted in the row it was picked from."""
    picked, rows = rows >= 0, rows.clamp_min(0)
    length = rows.shape[1]
    tokens = out.sequences[:, -length:]
    log_probs = [
        step.log_softmax(-1)[row, token]
        for step, row, token in zip(out.logits, rows.unbind(-1), tokens.unbind(-1), strict=False)
    ]
    noted = torch.stack(steps)[torch.arange(length, device=rows.device), :, rows]  # N x T x 3
    values = torch.cat([torch.stack(log_probs, -1).unsqueeze(-1), noted], -1)
    values = values.masked_fill(~picked.unsqueeze(-1), math.nan)
    means = values.nanmean(1).unbind(-1)[:3]  # of log-probability, entropy, mutual information
    score = means[1 if by == "entropy" else 2]
    abstained = score > (math.inf if abstain_above is None else abstain_above)
    return Generation(out.sequences, *values.unbind(-1), *means, abstained)
