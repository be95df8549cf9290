"""The model card of an adapter: what it is, what it was trained on, and how to load it."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from pyro_blora.likelihoods import CausalLM, LabelTokens, Likelihood, MultipleChoice

CARD = "README.md"
MARK = "<!-- {} writes this file anew; without this line it leaves it alone. -->"


def model_card(config: Mapping[str, Any], blora: Any, *, place: str) -> str:
    """The text of ``README.md``, with the hub's header; ``place`` is what it says to load."""
    base, kind, model = config["base_model"], config["base"]["class"], blora.model
    header = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="pyro_blora",
        tags=["bayesian-lora", "lora", "uncertainty", "pyro"],
    )
    family, data = blora.guide_family, model.likelihood.num_data
    name = config["guide"].get("name")  # none where there is a guide for each group
    rows = {
        "base": f"{base or 'a network that has no name on the hub'} ({kind})",
        "layers": ", ".join(f"{g.n} {g.name} ({g.d_out} x {g.d_in})" for g in model.groups),
        "heads trained as points": ", ".join(config["modules_to_save"]),
        "prior": repr(model.prior),
        "guide": repr(family) if name in (None, type(family).__qualname__) else name,
        "likelihood": repr(model.likelihood),
        "training examples": "" if data is None else f"{data:,}",
        **config["notes"],
    }
    table = "\n".join(f"| {k} | {_cell(v)} |" for k, v in rows.items() if v != "")
    net = "" if base else "net, "
    wrap = "" if base else f"net = ...  # the {kind} that it was trained on\n"
    return f"""---
{header.to_yaml()}
---

# A Bayesian LoRA adapter

Its low-rank updates are random, so that it says how sure it is: `predict` averages over draws of
its posterior.

| | |
|---|---|
{table}

```python
from pyro_blora import BayesianLoRA

{wrap}blora = BayesianLoRA.from_pretrained({net}"{place}")
prediction = blora.predict(batch)  # .probs, .entropy, .mutual_information
```

`bayesian_lora.safetensors` has its tensors, and in its header how to rebuild it, of which
`bayesian_lora_config.json` is a copy; nothing is unpickled.
"""


def lines_of_use(likelihood: Likelihood, temperature: float) -> tuple[dict[str, Any], str]:
    """The numbers that make probabilities of an exported adapter's logits, and how in Python."""
    found: dict[str, Any] = {"temperature": temperature}
    if isinstance(likelihood, CausalLM):
        found["in"] = "generation_config.json"
        return (
            found,
            f"net.generate(**inputs, do_sample=True, temperature={temperature!r}, top_k=0)",
        )
    if isinstance(likelihood, LabelTokens):
        found["token_ids"] = tokens = list(likelihood.token_ids)
        return (
            found,
            f"""# Rows are padded on the right
last = inputs["attention_mask"].sum(-1) - 1
logits = net(**inputs).logits[torch.arange(len(last)), last][:, {tokens}]
probs = (logits / {temperature!r}).softmax(-1)""",
        )
    if not isinstance(likelihood, MultipleChoice):
        return found, f"probs = (net(**inputs).logits / {temperature!r}).softmax(-1)"
    slope = float(likelihood.score_slope.detach().abs()) if likelihood.scale == "learned" else 1.0
    found = {"scale": slope / temperature, "score": likelihood.score}
    each = "" if likelihood.score == "sum" else " / n.clamp(min=1)"
    if likelihood.learn_length_penalty:
        found["length_exponent"] = exponent = float(likelihood.length_exponent.detach())
        each += f" * (n / n[n > 0].float().mean()) ** {exponent!r}"
    return (
        found,
        f"""# A row for each option, padded on the right; option_mask is true at its tokens
logp = net(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
logp, scored = logp.gather(-1, ids[:, 1:, None])[..., 0], option_mask[:, 1:]
n = scored.sum(-1)
scores = {found["scale"]!r} * (logp * scored).sum(-1){each}
probs = scores.masked_fill(n == 0, -torch.inf).softmax(-1)""",
    )


def figures_of(result: Any, data: int | None) -> dict[str, str]:
    """What a training says of itself in the notes of an adapter."""
    rows = {"steps": f"{len(result.history):,}"}
    last = [f for f in result.history[-50:] if {"nll", "kl"} <= f.keys()]
    if last and data:
        nll, kl = (sum(f[key] for f in last) / len(last) for key in ("nll", "kl"))
        rows["ELBO"] = (
            f"{-(data * nll + kl):.4g} nats, {-(nll + kl / data):.4g} per example (KL {kl:.4g} "
            f"nats), the mean of the last {len(last)} steps"
        )
    for step, nll in result.validation:  # the last one stays
        rows["validation NLL"] = f"{nll:.4g} at step {step}"
    if result.best_step is not None:
        best = dict(result.validation)[result.best_step]
        rows["validation NLL"] += f"; lowest {best:.4g} at step {result.best_step}"
    return rows


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
