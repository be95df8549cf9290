"""Transformers of a few thousand weights, made from their configurations, and batches for them."""

import inspect
import itertools
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyro
import torch
import transformers as hf
from pyro.infer import TraceMeanField_ELBO
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from pyro_blora import BayesianLoRA, fit, guides, likelihoods, models
from pyro_blora.inference.trainer import BayesianLoRATrainer

VOCABULARY = 32
ANSWERS = (5, 6, 7)
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}
_SIZES["initializer_range"] = 0.3  # the default of 0.02 leaves so small a network all but constant


def _settled(net):
    """Random biases too, for transformers starts them at zero, where they could not be missed."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return net.eval()


def _decoder(name, layers, tied, **options):
    sizes = {**_SIZES, "num_hidden_layers": layers, "num_key_value_heads": 2}
    config = getattr(hf, f"{name}Config")(**{**sizes, "tie_word_embeddings": tied, **options})
    return _settled(getattr(hf, f"{name}ForCausalLM")(config))


def llama(layers=2, *, tied=False, **options):
    """``q_proj`` 16 x 16, ``v_proj`` 8 x 16, no biases."""
    return _decoder("Llama", layers, tied, **options)


def qwen2(layers=2, *, tied=True):
    """As Llama, with biases on q, k and v."""
    return _decoder("Qwen2", layers, tied)


def gpt2(layers=2):
    """``c_attn`` 48 x 16 as a Conv1D, whose weight is stored transposed; a tied head."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": layers, "n_head": 4}
    sizes |= {"n_positions": 32, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return _settled(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **dropouts)))


def bert(layers=2, *, name="Bert", task="SequenceClassification", **options):
    """A sequence classifier of three classes, or one of tokens."""
    sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **_SIZES}
    sizes |= {"num_hidden_layers": layers, "num_labels": len(ANSWERS)}
    config = getattr(hf, f"{name}Config")(**sizes | options)
    return _settled(getattr(hf, f"{name}For{task}")(config))


def labeler():
    """The same for three labels at once."""
    return bert(problem_type="multi_label_classification")


def tagger():
    """The same for the class of each token."""
    return bert(task="TokenClassification")


class BareClassifier(torch.nn.Module):
    """The same around a BERT, without a configuration."""

    def __init__(self, vocabulary=VOCABULARY):
        super().__init__()
        self.bert = bert(vocab_size=vocabulary).bert
        self.classifier = torch.nn.Linear(16, len(ANSWERS))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        hidden = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        return SimpleNamespace(logits=self.classifier(hidden))


def scorer(vocabulary=VOCABULARY, **options):
    """A BERT with a head of one output."""
    return bert(num_labels=1, vocab_size=vocabulary, **options)


def distilbert(layers=2):
    """The same with a head of two modules, one of whose names ends in the other's."""
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_heads": 2}
    sizes |= {"n_layers": layers, "num_labels": len(ANSWERS), "max_position_embeddings": 32}
    config = hf.DistilBertConfig(dropout=0.0, **sizes)
    return _settled(hf.DistilBertForSequenceClassification(config))


def roberta(layers=2):
    """The same with two layers in its head."""
    return bert(layers, name="Roberta")


def llama_classifier():
    torch.manual_seed(0)
    return hf.LlamaForSequenceClassification(llama(num_labels=3).config).eval()


def sequences(rows=4, length=7, *, seed=0):
    """Right-padded rows with one class each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        mask[row, length - 1 - row % (length - 2) :] = 0
    labels = torch.arange(rows) % len(ANSWERS)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def numbers(rows=4, length=7, *, seed=0):
    """The same rows with a number each."""
    batch = sequences(rows, length, seed=seed)
    return {**batch, "labels": batch["input_ids"].float().mean(-1)}


def several(rows=4, length=7, *, seed=0):
    """The same rows with 0 or 1 for each label, as floats."""
    labels = torch.arange(rows)[:, None] >> torch.arange(len(ANSWERS)) & 1
    return {**sequences(rows, length, seed=seed), "labels": labels.float()}


def texts(rows=4, length=7, *, seed=0):
    """The same rows with a label for each token, -100 at the padding and at the first two."""
    batch = sequences(rows, length, seed=seed)
    scored = batch["attention_mask"].bool() & (torch.arange(length) >= 2)
    return {**batch, "labels": batch["input_ids"].masked_fill(~scored, -100)}


def tags(rows=4, length=7, *, seed=0):
    """The same rows with one of three tags where they have a label."""
    batch = texts(rows, length, seed=seed)
    tags = batch["labels"] % len(ANSWERS)
    return {**batch, "labels": tags.masked_fill(batch["labels"] < 0, -100)}


def choices(items=3, options=3, length=8, *, seed=0):
    """Multiple choice: a question of four tokens, then one to three tokens for each option."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCABULARY, (items, options, length), generator=generator)
    ids[..., :4] = ids[:, :1, :4]
    end = 5 + torch.arange(options) % 3
    real = (torch.arange(length) < end[:, None]).expand(items, -1, -1)
    return {
        "input_ids": ids * real,
        "attention_mask": real.long(),
        "option_mask": real & (torch.arange(length) >= 4),
        "labels": torch.arange(items) % options,
    }


def pairs(rows=4, length=7, *, seed=0):
    """Two texts each, of which the first or the second was chosen."""
    batch = sequences(2 * rows, length, seed=seed)
    both = {key: batch[key].view(rows, 2, length) for key in ("input_ids", "attention_mask")}
    return {**both, "labels": torch.arange(rows) % 2}


def unlabeled(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def rows_of(batch):
    """The rows of a batch, to collate."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]


def examples(count=10, *, seed=0):
    """Single rows of differing lengths, to collate."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(8, VOCABULARY, (3 + index % 5,), generator=generator)
        rows.append({"input_ids": ids, "label": index % len(ANSWERS), "index": index})
    return rows


def collate(rows):
    """Right-padded batches of ``examples``."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["label"] for row in rows]),
        "index": torch.tensor([row["index"] for row in rows]),
    }


class Stream(IterableDataset):
    """Rows without places."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class SizedStream(Stream):
    def __len__(self):
        return len(self.rows)


def adapted(net=None, *, num_data=12, rank=2, prior=None, guide=None, **options):
    """A tiny Llama with ``q_proj`` and ``v_proj`` adapted; draws are wide enough to tell apart."""
    options.setdefault("likelihood", likelihoods.LabelTokens(token_ids=ANSWERS, num_data=num_data))
    options.setdefault("target_modules", ["q_proj", "v_proj"])
    return BayesianLoRA(
        llama() if net is None else net,
        prior=models.KroneckerInducing(rank=rank, sigma=1.0) if prior is None else prior,
        guide=guides.MatrixNormal(init_scale=0.1) if guide is None else guide,
        **options,
    )


def train(blora, rows=None, **options):
    """``fit`` on ten rows of differing lengths in batches of four, so that the last holds two."""
    usual = {"collate": collate, "num_steps": 6, "batch_size": 4, "progress": False}
    return fit(blora, examples() if rows is None else rows, **{**usual, **options})


def trainer(folder, blora, rows=None, **options):
    """A silent trainer on the CPU; options are split by whom they belong to."""
    names = ("compute_metrics", "data_collator", "eval_dataset", "eval_samples")
    names += ("learning_rates", "num_particles", "processing_class", "held_out")
    parts = {name: options.pop(name) for name in names if name in options}
    usual = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = hf.TrainingArguments(str(folder), **{**usual, **options})
    parts = {"train_dataset": rows, "data_collator": collate, **parts}
    made = BayesianLoRATrainer(blora, arguments, **parts)
    assert arguments.remove_unused_columns  # the user's own stay as they are
    return made


def elbo(particles=8, kind=TraceMeanField_ELBO):
    """An ELBO of particles that share out the rows."""
    return kind(particles, max_plate_nesting=1, vectorize_particles=True)


def anew(part):
    """The same prior, guide or likelihood, for another adapter."""
    return type(part)(**part.options())


def probed(blora):
    """The same, after the network has been probed, so that its passes may be counted."""
    for num_samples in (0, 2):
        blora.predict(sequences(), num_samples)
    return blora


def gradients(blora, batch, elbo, *, seed=0):
    """Loss and gradients of one step from a fixed seed."""
    pyro.set_rng_seed(seed)
    blora.zero_grad()
    loss = elbo(blora.model, blora.guide)(batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in blora.named_parameters()}}


def equal(found, expected):
    """Whether two state dicts hold equal tensors by the same names."""
    return set(found) == set(expected) and all(
        torch.equal(found[k], v) for k, v in expected.items()
    )


def shaken(module, size):
    """``module`` with normal noise on each of its parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def answers(logits, batch):
    """The answer tokens' logits after each row's last token, of those at all positions."""
    last = batch["attention_mask"].sum(-1) - 1
    return logits[torch.arange(len(last)), last][:, list(ANSWERS)]


def scored(run, *args):
    """What ``run`` returns, and the negative log-likelihood per example of the labels in it."""
    with pyro.poutine.trace() as seen, pyro.poutine.block(expose=["labels"]):
        result = run(*args)
    site = seen.trace.nodes["labels"]
    return result, -site["fn"].log_prob(site["value"]).mean().detach()


def raising(error, calls):
    """``collate``, which raises an error at one of its calls."""
    count = itertools.count(1)

    def collate_or_raise(rows):
        if next(count) == calls:
            raise error
        return collate(rows)

    return collate_or_raise


def priors():
    """Every prior of the library by name, as small as its options allow."""
    return _smallest(models, models.UpdateModel)


def families():
    """Every guide family of the library by name."""
    return _smallest(guides, guides.SiteGuide)


def _smallest(package, contract):
    kinds = {name: getattr(package, name) for name in sorted(package.__all__)}
    kinds = {n: k for n, k in kinds.items() if issubclass(k, contract) and k is not contract}
    ranked = {n for n, k in kinds.items() if "rank" in inspect.signature(k).parameters}
    return {n: kind(rank=2) if n in ranked else kind() for n, kind in kinds.items()}


def written(folder):
    """The names in a folder."""
    return {path.name for path in Path(folder).iterdir()}


def trained(blora):
    """The adapter's unconstrained tensors, copied."""
    return {name: value.detach().clone() for name, value in blora.named_parameters()}


def contract(module, base, name, *, make=None, parts=None, **members):
    """Puts ``Test<name>``, a subclass of a contract with these parts, into a module."""
    if make is not None:
        members["make"] = lambda self: anew(make)
    if parts is not None:
        members["parts"] = lambda self: parts
    name = f"Test{name}"
    module[name] = type(name, (base,), {"__module__": module["__name__"], **members})


#: How each likelihood is made, a network, and its batches.
LIKELIHOODS = {
    "CausalLM": (likelihoods.CausalLM, llama, texts),
    "LabelTokens": (partial(likelihoods.LabelTokens, token_ids=ANSWERS), llama, sequences),
    "MultiLabel": (likelihoods.MultiLabel, labeler, several),
    "MultipleChoice": (likelihoods.MultipleChoice, llama, choices),
    "Ordinal": (partial(likelihoods.Ordinal, num_classes=3), scorer, sequences),
    "Preference": (likelihoods.Preference, scorer, pairs),
    "Regression": (likelihoods.Regression, scorer, numbers),
    "SequenceClassification": (likelihoods.SequenceClassification, bert, sequences),
    "TokenClassification": (likelihoods.TokenClassification, tagger, tags),
}
