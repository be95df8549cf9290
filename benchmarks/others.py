"""Rivals by their own packages: laplace-torch, IVON and adapters of PEFT, in one training loop.

The loop has the batches, the schedule, the clipping and the rate of a new head that ``fit`` has, so
``"peft"`` checks the method ``lora`` with other code. No environment of the project has
laplace-torch 0.3 and ivon-opt 0.1.3, which are imported where they are used.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, MontecloraConfig, PveraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

from pyro_blora.data import Task
from pyro_blora.data.batches import endless_batches, predict_dataset
from pyro_blora.data.splits import hold_out
from pyro_blora.errors import ConfigurationError, NonFiniteLossError
from pyro_blora.evaluation.metrics import fit_temperature
from pyro_blora.inference.learning_rates import RATES
from pyro_blora.inference.loop import rate as share_of_rate
from pyro_blora.likelihoods import Batch, Collate, Likelihood
from pyro_blora.network.targets import head_names, is_classifier
from pyro_blora.posterior.bayesian_lora_model import to_device
from pyro_blora.prediction import Prediction

LAST_LAYER, ALL = "laplace-torch last layer", "laplace-torch"
_LAPLACE = {"prior_structure": "scalar", "link_approx": "probit", "hessian_structure": "kron"}
#: The usual settings of each method, which ``change`` overrides.
USUAL: dict[str, dict[str, Any]] = {
    "peft": {},
    # the covariance is multiplied by the scale (Maddox et al. 2019, arXiv:1902.02476)
    "swag": {"start": 0.5, "max_rank": 20, "scale": 0.5},
    # as in the code published with arXiv:2411.04421, whose ess is far above the number of rows
    "ivon-lora": {"ess": 1e7, "hess_init": 3e-4, "clip_radius": 1e-3, "beta2": 0.99999}
    | {"weight_decay": 0.0, "rescale_lr": False},
    "pvera": {"sample_at_inference": True},  # its rank is 256, of which few numbers are trained
    "monteclora": {},  # draws in training alone
    LAST_LAYER: _LAPLACE,
    ALL: _LAPLACE,
}
NAMES = tuple(USUAL)
_SMALLEST, _MAX_GRAD_NORM = 1e-3, 1.0  # as in ``fit``

Draw = Callable[[], AbstractContextManager[Any]]  # weights drawn for the time of the context
Probs = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Fitted:
    """Predictions of data sets with their labels, and what they cost."""

    predictions: dict[str, tuple[Prediction, Tensor]]
    seconds: float  #: of the training, with Laplace's curvature and prior precision
    numbers: int  #: trained parameters
    passes: int  #: of a prediction


class _Logits(nn.Module):
    """A network that is called with a batch and gives the logits of its likelihood."""

    def __init__(self, net: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.net, self.device = net, next(net.parameters()).device
        self.likelihood = likelihood.bind(self.device)

    def forward(self, batch: Batch) -> Tensor:
        return self.likelihood.logits(
            self.net, self.likelihood.prepare(to_device(batch, self.device))
        )

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def train_other(
    name: str,
    net: nn.Module,
    task: Task,
    collate: Collate,
    *,
    rate: float,
    num_steps: int,
    batch_size: int,
    seed: int,
    held_out: float,
    rank: int,
    target_modules: Sequence[str],
    num_samples: int,
    data: Mapping[str, Sequence[Any]],
    change: Mapping[str, Any] | None = None,
) -> Fitted:
    """Trains a method of :data:`NAMES` on the rows of a task, and predicts the items of ``data``.

    The network must be fresh and is changed. ``rate`` is that of the adapter's weights, of IVON its
    ``lr``. The share ``held_out`` of the training rows is for a temperature of the logarithms of
    the mean probabilities; predictions are then one distribution instead of draws.
    """
    if name not in NAMES:
        raise ConfigurationError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    new_head = is_classifier(net)
    if name == LAST_LAYER and not new_head:
        raise ConfigurationError(
            f"{name!r} must have a network with a new head, got {type(net).__name__}; leave it out."
        )
    settings = USUAL[name] | dict(change or {})
    torch.manual_seed(seed)
    train, held = hold_out(task.train, held_out)
    model = _Logits(net, task.likelihood(collate))
    extra: Callable[[], Any] = lambda: 0.0  # noqa: E731
    lora: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": [*target_modules]}
    if name == "pvera":
        get_peft_model(net, PveraConfig(target_modules=[*target_modules], **settings))
    elif name == "monteclora":
        lora["monteclora_config"] = MontecloraConfig(**settings)
        extra = get_peft_model(net, LoraConfig(**lora)).base_model._get_monteclora_loss
    else:
        get_peft_model(net, LoraConfig(**lora))
    groups: list[dict[str, Any]] = [{"params": model.trained, "lr": rate}]
    stream = endless_batches(train, collate, batch_size=batch_size, seed=seed)
    if new_head:
        seen = next(stream)
        groups += _new_heads(model, seen)
        stream = chain([seen], stream)
    weights, first = list[Tensor](), num_steps
    ivon: Any = None
    if name == "ivon-lora":
        ivon = import_module("ivon").IVON(groups.pop(0)["params"], lr=rate, **settings)
    if name == "swag":  # the rate stays as it is while weights are kept
        first = int(settings.pop("start") * num_steps)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    optimizers: list[Any] = [torch.optim.AdamW(groups, weight_decay=0.0)] if groups else []
    optimizers += [ivon] if ivon else []
    share = lambda step: share_of_rate(min(step, first), num_steps)  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in optimizers]
    net.train()
    for step in range(num_steps):
        batch = next(stream)
        net.zero_grad()
        with ivon.sampled_params(train=True) if ivon else nullcontext():
            loss = cross_entropy(model(batch), batch["labels"].to(model.device)) + extra()
            if not loss.isfinite():
                raise NonFiniteLossError(f"The loss of {name} is {loss:.3g} at step {step}.")
            loss.backward()
        # IVON has the gradient already, and clips its own steps
        clip_grad_norm_([p for group in groups for p in group["params"]], _MAX_GRAD_NORM)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        if step >= first:
            weights.append(parameters_to_vector(model.trained).detach())
    net.eval()
    draw: Draw = ivon.sampled_params if ivon else nullcontext
    probs: Probs = lambda batch: model(batch).softmax(-1)  # noqa: E731
    draws, passes = (num_samples if name in ("swag", "ivon-lora", "pvera") else 1), 1
    if name == "swag":
        draw = _swag(model.trained, torch.stack(weights), **settings)
    elif name in (LAST_LAYER, ALL):
        rows = DataLoader(train, batch_size, collate_fn=collate)
        probs, passes = _laplace(name, model, rows, **settings)
    seconds = time.perf_counter() - begin
    torch.manual_seed(seed)
    options: dict[str, Any] = {"device": model.device, "precision": "float32", "progress": False}
    options["batch_size"] = 1 if name == ALL else 16  # its Jacobians cost the square of this
    sets = {**data, **({"held out": held} if len(held) else {})}
    drawn: dict[str, list[Tensor]] = {key: [] for key in sets}
    labels: dict[str, Any] = {}
    for _ in range(draws):
        with torch.no_grad(), draw():
            for key, items in sets.items():
                prediction, labels[key] = predict_dataset(
                    lambda batch: Prediction(probs(batch)[None]), items, collate, **options
                )
                drawn[key].append(prediction.samples)
    whole = {key: Prediction(torch.cat(samples)) for key, samples in drawn.items()}
    if len(held):
        temperature = fit_temperature(whole.pop("held out").probs.log(), labels["held out"])
        scaled = {key: (p.probs.log() / temperature).softmax(-1) for key, p in whole.items()}
        whole = {key: Prediction(each[None]) for key, each in scaled.items()}
    predictions = {key: (each, labels[key]) for key, each in whole.items()}
    return Fitted(predictions, seconds, sum(p.numel() for p in model.trained), draws * passes)


@torch.no_grad()
def _new_heads(model: _Logits, batch: Batch) -> list[dict[str, Any]]:
    """Unfreezes new heads; their groups have the rates of ``fit``, by their inputs in a batch."""
    modules = [m for head in head_names(model.net) for m in model.net.get_submodule(head).modules()]
    sizes: dict[nn.Module, float] = {}

    def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[module] = max(float(args[0].float().abs().sum(-1).mean()), _SMALLEST)

    owners = [module for module in modules if [*module.parameters(recurse=False)]]
    hooks = [owner.register_forward_pre_hook(measure) for owner in owners]
    unit = RATES["head"] * math.log2(max(model.eval()(batch).shape[-1], 2)) ** 0.5
    for hook in hooks:
        hook.remove()
    own = [[p.requires_grad_() for p in m.parameters(recurse=False)] for m in owners]
    return [{"params": p, "lr": unit / sizes[m]} for p, m in zip(own, owners, strict=True)]


def _swag(parameters: list[nn.Parameter], weights: Tensor, max_rank: int, scale: float) -> Draw:
    """Draws by the mean, the variances and the deviations of ``weights``, one row for a step."""
    every, mean = math.ceil(len(weights) / max_rank), weights.mean(0)
    kept = range(every - 1, len(weights), every)
    D = torch.stack([weights[k] - weights[: k + 1].mean(0) for k in kept])
    D, stddev = D / max(len(D) - 1, 1) ** 0.5, weights.std(0, correction=0)

    @contextmanager
    def draw() -> Iterator[None]:
        noise = stddev * torch.randn_like(mean) + torch.randn(len(D)).to(D) @ D
        vector_to_parameters(mean + scale**0.5 * noise, parameters)
        yield

    return draw


def _laplace(
    name: str,
    model: _Logits,
    rows: DataLoader[Any],
    *,
    prior_structure: str,
    link_approx: str,
    **settings: Any,
) -> tuple[Probs, int]:
    """The linearized predictive of laplace-torch, and the passes that it takes."""
    part = "all"
    if name == LAST_LAYER:
        part, settings["last_layer_name"] = "last_layer", f"net.{head_names(model.net)[-1]}"
    laplace = import_module("laplace").Laplace(model, "classification", part, **settings)
    laplace.fit(rows)
    laplace.optimize_prior_precision(
        "glm", "marglik", prior_structure=prior_structure, link_approx=link_approx
    )
    passes = 1 if name == LAST_LAYER else int(laplace.n_outputs)
    return lambda batch: laplace(batch, pred_type="glm", link_approx=link_approx), passes
