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


def program_of_use(
    likelihood: Likelihood, temperature: float, base: str | None, classifies: bool
) -> tuple[dict[str, Any], str]:
    """The numbers that make probabilities of an exported adapter's logits, and how in Python."""
    found: dict[str, Any] = {"temperature": temperature}
    kind = f"AutoModelFor{'SequenceClassification' if classifies else 'CausalLM'}"
    program = f"""import torch
from peft import PeftModel
from transformers import AutoTokenizer, {kind}

base = {base!r}  # a hub id or a folder
tokenizer = AutoTokenizer.from_pretrained(base)
net = {kind}.from_pretrained(base, dtype=torch.float32)
"""
    if base == "smollm2" and not classifies:
        program = """import torch
from peft import PeftModel
from pyro_blora import load_pretrained

net, tokenizer = load_pretrained("smollm2")
"""
    program += """net = PeftModel.from_pretrained(net, ".").eval()  # this folder
prompt = "Question: ...\\nAnswer:"  # as in training
ids = tokenizer(prompt)["input_ids"]
"""
    if not classifies:
        program += """while ids[-1] == tokenizer.eos_token_id:  # the answer goes on from the prompt
    ids.pop()
"""
    if isinstance(likelihood, MultipleChoice):
        learned = likelihood.scale == "learned"
        slope = float(likelihood.score_slope.detach().abs()) if learned else 1.0
        found = {"scale": slope / temperature, "score": likelihood.score}
        program += f"""options, scores = [" ...", " ..."], []
for option in options:
    answer = tokenizer(option, add_special_tokens=False)["input_ids"]
    logp = net(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    places = range(len(ids) - 1, len(ids) + len(answer) - 1)
    scores.append(logp[places, answer].{likelihood.score}())
probs = ({found["scale"]!r} * torch.stack(scores)).softmax(-1)"""
        return found, program
    if isinstance(likelihood, CausalLM):
        found["in"] = "generation_config.json"
        options = f'"do_sample": True, "temperature": {temperature!r}, "top_k": 0'
        program += f"""options = {{"max_new_tokens": 20, {options}}}
print(tokenizer.decode(net.generate(input_ids=torch.tensor([ids]), **options)[0]))"""
        return found, program
    logits = "net(input_ids=torch.tensor([ids])).logits"
    if isinstance(likelihood, LabelTokens):
        found["token_ids"] = list(likelihood.token_ids)
        logits += f"[:, -1, {found['token_ids']}]"
    return found, f"{program}probs = ({logits} / {temperature!r}).softmax(-1)"


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
