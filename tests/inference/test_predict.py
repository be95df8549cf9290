"""The posterior predictive of a batch."""

import math

import pyro
import pytest
import tiny
import torch
from own_classes import Sloped
from own_tokenizer import build_tokenizer
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_blora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides import Ensemble, Laplace, MeanField
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.models import Hierarchical, KroneckerInducing
from pyro_blora.posterior.posterior import rows_of_a_pass


def moved(**options):
    blora = tiny.adapted(**options)
    for name, parameter in blora.guide.named_parameters():
        if "loc" in name:
            torch.nn.init.normal_(parameter)
    return blora


@torch.no_grad()
@pytest.mark.parametrize("num_samples", [0, 1])
def test_the_mean_has_no_noise_and_one_draw_is_held(num_samples):
    prior = KroneckerInducing(rank=2, conditional="deterministic" if num_samples else "exact")
    blora, batch, found = moved(prior=prior), tiny.sequences(), []
    for _ in range(2):
        with blora.posterior(num_samples) as net:
            found.append(net(batch["input_ids"]).logits)
            assert torch.equal(net(batch["input_ids"]).logits, found[-1])
    assert torch.equal(*found) == (num_samples == 0)
    one, other = (blora.predict(batch, num_samples).samples for _ in range(2))
    assert torch.equal(one, other) == (num_samples == 0)


@pytest.mark.parametrize(
    ("draws", "max_rows", "expected"), [(20, None, [64, 16]), (5, 1, [4] * 5), (5, 11, [8, 8, 4])]
)
def test_a_pass_has_as_many_rows_as_it_may(draws, max_rows, expected):
    batch = tiny.sequences(4, 16)
    blora, sizes = tiny.probed(tiny.adapted()), []
    assert rows_of_a_pass(blora.model, batch) == 64
    assert rows_of_a_pass(blora.model, {**batch, "input_ids": torch.ones(1, 5000)}) == 1
    note = lambda _, args, inputs: sizes.append(len(inputs["input_ids"]))  # noqa: E731
    blora.net.register_forward_pre_hook(note, with_kwargs=True)
    assert blora.predict(batch, draws, max_rows=max_rows).samples.shape == (draws, 4, 3)
    assert sizes == expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_samples", [0, 2])
def test_each_part_is_left_in_its_own_mode(training, num_samples):
    blora, batch = tiny.probed(tiny.adapted()), tiny.sequences()
    blora.net.train(training)
    blora.net.model.layers[0].eval()
    before = [module.training for module in blora.net.modules()]
    modes = []
    blora.net.register_forward_pre_hook(lambda net, args: modes.append(net.training))
    blora.predict(batch, num_samples)
    assert modes == [False]
    with pytest.raises(IndexError):
        blora.predict({**batch, "input_ids": batch["input_ids"] + 10**6}, num_samples)
    assert [module.training for module in blora.net.modules()] == before


def test_between_two_passes_the_network_is_in_its_own_mode():
    """Two predictions may take turns, and the one that ends first leaves the other as it was."""
    blora, batch, modes = tiny.probed(tiny.adapted()), tiny.sequences(), []
    blora.net.train()
    blora.net.register_forward_pre_hook(lambda net, args: modes.append(net.training))
    one, other = (blora.posterior.logits(batch, n, max_rows=1) for n in (1, 3))
    next(one), next(other)
    assert blora.net.training
    assert [len(list(draws)) for draws in (one, other)] == [0, 2]
    assert modes == [False] * 4
    assert blora.net.training


@pytest.mark.parametrize("plain", [Tensor.tolist, Tensor.numpy, lambda t: list(t.numpy())])
def test_lists_and_arrays_of_numbers_are_taken_for_tensors(plain):
    """Whatever else is in the batch stays as it is; the same batch of tensors is the judge."""

    def collate(rows):
        return {name: plain(value) for name, value in tiny.collate(rows).items()} | others

    others, ends = {"name": ["a", "b"], "parts": [[1], [1, 2]]}, []
    for made in (tiny.collate, collate):
        torch.manual_seed(0)
        blora = tiny.adapted(guide=Laplace(), num_data=10)
        tiny.train(blora, collate=made, validation=tiny.examples(8), seed=0)
        batch = made(tiny.examples(8))
        answers = {"mean": blora.predict(batch, 0).samples, "log": blora.log_predictive(batch, 0)}
        ends.append({**tiny.trained(blora), **answers})
    assert tiny.equal(*ends)


@pytest.mark.parametrize(("num_samples", "max_rows"), [(0, 100), (5, 4)])
@pytest.mark.parametrize(
    ("build", "likelihood"),
    [
        (tiny.llama, LabelTokens(token_ids=tiny.ANSWERS)),
        (tiny.llama, MultipleChoice()),
        (tiny.bert, SequenceClassification()),
    ],
)
def test_log_predictive_is_that_of_the_mean_probability(build, likelihood, num_samples, max_rows):
    batch = tiny.choices(4) if isinstance(likelihood, MultipleChoice) else tiny.sequences()
    blora = moved(net=build(), target_modules=None, likelihood=likelihood)
    torch.manual_seed(0)
    prediction = blora.predict(tiny.unlabeled(batch), num_samples, max_rows=max_rows)
    assert prediction.samples.shape == (max(num_samples, 1), 4, 3)
    assert not prediction.samples.requires_grad
    torch.manual_seed(0)
    found = blora.log_predictive(batch, num_samples, max_rows=max_rows)
    expected = prediction.probs.gather(-1, batch["labels"][:, None])[:, 0].log()
    torch.testing.assert_close(found, expected)


ROWS = tiny.examples(22)


@pytest.mark.parametrize("size", [4, 7, None])
def test_all_examples_are_predicted_in_the_order_of_the_data(size):
    blora, rows = moved(), ROWS[::-1]
    data = DataLoader(rows, size, collate_fn=tiny.collate) if size else rows
    options = {"num_samples": 0, "progress": False, "collate": None if size else tiny.collate}
    found, labels = blora.predict_dataset(data, batch_size=5, **options)
    assert labels.tolist() == [row["label"] for row in rows]
    alone = [blora.predict(tiny.collate([row]), 0).samples for row in rows]
    torch.testing.assert_close(found.samples, torch.cat(alone, 1), atol=1e-6, rtol=1e-5)
    scores, counts = blora.log_predictive_dataset(data, **options)
    assert counts.tolist() == [1] * 22
    torch.testing.assert_close(scores, found.probs[range(22), labels].log(), atol=1e-5, rtol=1e-5)


def test_a_collator_that_makes_windows_of_its_rows_is_for_loaders():
    """Of rows each has a place, to which no window would belong."""
    blora, rows = tiny.adapted(), tiny.examples(12)

    def windows(part):
        return tiny.collate([row for row in part for _ in range(1 + row["index"] % 2)])

    for call in (blora.predict_dataset, blora.log_predictive_dataset, blora.evaluate):
        with pytest.raises(BatchError, match=r"one row of each example, got 18 of 12; pass a Data"):
            call(rows, windows, 0)
    loader = DataLoader(rows, 4, collate_fn=windows)
    assert len(blora.predict_dataset(loader, None, 0)[1]) == 18


def test_the_mean_has_no_gradient_and_says_so():
    blora, batch = BayesianLoRA(tiny.bert()), tiny.sequences()
    with pytest.raises(ConfigurationError, match="call fit, use BayesianLoRATrainer"):
        blora.train()(**batch)
    with torch.no_grad():
        assert torch.isfinite(blora(**batch).loss)
    assert torch.isfinite(blora.eval()(**batch).loss)


def test_examples_without_labels_are_predicted_without_labels():
    def unlabeled(rows):
        return tiny.unlabeled(tiny.collate(rows))

    def some(rows):
        return (unlabeled if rows[0]["index"] == 0 else tiny.collate)(rows)

    blora = moved()
    found, labels = blora.predict_dataset(ROWS, unlabeled, 0, progress=False)
    assert labels is None
    assert torch.equal(found.samples, blora.predict_dataset(ROWS, tiny.collate, 0)[0].samples)
    with pytest.raises(BatchError, match="labels, or none"):
        blora.predict_dataset(ROWS, some, 0, batch_size=2, progress=False)


def test_a_list_of_any_length_is_cut_into_batches_of_similar_texts():
    """As one batch, 200 texts would be padded to the longest, and took ten times as long."""
    tokenizer, shapes = build_tokenizer(["key lock"], pad="<pad>"), []
    net = tiny.bert(max_position_embeddings=400)
    net.resize_token_embeddings(len(tokenizer))
    blora = moved(net=net, target_modules=None, likelihood=SequenceClassification())
    blora.tokenizer = tokenizer
    texts = ["key " * (1 + 37 * k % 50) for k in range(40)]
    note = lambda _, args, inputs: shapes.append(inputs["input_ids"].shape)  # noqa: E731
    kept = net.register_forward_pre_hook(note, with_kwargs=True)
    found = blora.predict(texts, 0).samples
    kept.remove()
    assert max(rows for rows, _ in shapes) <= 16
    assert sum(rows * length for rows, length in shapes) < 0.75 * 40 * max(n for _, n in shapes)
    for k in (0, 17, 39):
        alone = blora.predict(dict(tokenizer([texts[k]], return_tensors="pt")), 0).samples
        torch.testing.assert_close(found[:, k, None], alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(blora.predict([{"text": text} for text in texts], 0).samples, found)


def test_the_same_seed_gives_the_same_prediction_of_an_ensemble():
    blora, found = moved(guide=Ensemble(members=5)), []
    for seed in (1, 0, 0):
        torch.manual_seed(seed)
        found.append(blora.predict(tiny.sequences(), 3).samples)
    assert torch.equal(*found[1:])


# Draws that are not the guide's: those of NUTS, or any values of the sites


def values(blora, count=3, seed=1):
    """Any values of the sites, as ``get_samples`` has them: here draws of the prior."""
    pyro.set_rng_seed(seed)
    return {
        site.name: site.prior.sample((count,)).detach().double()  # as other programs have them
        for site in blora.model.sites
    }


def conditioned(blora, samples, batch):
    """The site ``labels`` of the plain Pyro model at each of the values, one after the other."""
    for index in range(len(next(iter(samples.values())))):
        data = {name: value[index].float() for name, value in samples.items()}
        with torch.no_grad():
            model = pyro.condition(blora.model, data)
            yield pyro.poutine.trace(model).get_trace(batch).nodes["labels"]


def choosing():
    """GPT-2 whose scores have a scale that was learned."""
    blora = tiny.adapted(tiny.gpt2(), target_modules=["c_attn"], likelihood=Sloped(num_data=12))
    torch.nn.init.constant_(blora.likelihood.slope, 2.5)
    return blora, tiny.choices()


def headed():
    """BERT whose head was trained as a point, under sites outside of the layers' plate."""
    options = {"prior": Hierarchical(rank=2), "likelihood": SequenceClassification(num_data=12)}
    blora = tiny.adapted(tiny.bert(), target_modules=["query", "value"], **options)
    tiny.shaken(blora.model.trained_heads, 1.0)
    return blora, tiny.sequences()


PARTS = [
    choosing,
    headed,
    lambda: (tiny.adapted(guide=AutoNormal), tiny.sequences()),  # one that has not run
]


@pytest.mark.parametrize("make", PARTS)
def test_a_prediction_is_that_of_the_conditioned_model(make):
    blora, batch = make()
    samples = values(blora)
    expected = torch.stack([node["fn"].probs for node in conditioned(blora, samples, batch)])
    given = {"labels": torch.zeros(3, 4), **samples}  # as Predictive has them
    found = blora.predict(batch, samples=given)
    torch.testing.assert_close(found.samples, expected, atol=1e-5, rtol=0)
    assert found.mutual_information.max() > 1e-3  # the values matter


@pytest.mark.parametrize("prior", [Hierarchical(rank=2), KroneckerInducing(core="horseshoe")])
def test_draws_of_predictive_are_taken(prior):
    """In parallel they have dimensions of size one for the plates outside of theirs."""
    blora, batch = tiny.adapted(prior=prior, guide=MeanField(init_scale=0.3)), tiny.sequences()
    drawn = Predictive(blora.guide, num_samples=3, parallel=True)(batch)
    shapes = {site.name: (3, *site.prior.shape()) for site in blora.model.sites}
    plain = {name: drawn[name].reshape(shape) for name, shape in shapes.items()}
    expected = blora.predict(batch, samples=plain).samples
    for given in (drawn, {name: value.tolist() for name, value in plain.items()}):
        torch.testing.assert_close(blora.predict(batch, samples=given).samples, expected)


def test_the_log_predictive_is_the_mean_over_them():
    likelihood = CausalLM(num_data=12)
    blora = tiny.adapted(tiny.gpt2(), target_modules=["c_attn"], likelihood=likelihood)
    samples, batch = values(blora, 5), tiny.texts()
    nodes = conditioned(blora, samples, batch)
    scores = torch.stack([node["fn"].log_prob(node["value"]) for node in nodes])
    expected = scores.logsumexp(0) - math.log(5)
    found = blora.log_predictive(batch, samples=samples)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


Q, V = "q_proj.V", "v_proj.V"


def test_values_that_are_no_draws_are_refused():
    blora, batch = tiny.adapted(), tiny.sequences()
    s = values(blora)
    wrong = [{Q: s[Q][None]}, {Q: s[Q][..., :1]}, {V: s[V][:2]}, {Q: s[Q] * math.nan}]
    wrong += [{Q: s[Q][:0], V: s[V][:0]}, {Q: 1.0, V: s[V]}]
    for samples in [{Q: s[Q]}, *(s | changed for changed in wrong)]:
        for ask in (blora.predict, blora.log_predictive):
            with pytest.raises(ConfigurationError):
                ask(batch=batch, samples=samples)
    with pytest.raises(ConfigurationError, match="linearized"):
        blora.predict(batch, samples=s, linearized=True)
    blora, batch = headed()
    s = values(blora)
    tau = next(name for name in s if name.endswith("tau"))
    with pytest.raises(ConfigurationError, match="outside of it"):  # unconstrained
        blora.predict(batch, samples={**s, tau: s[tau].log() - 9})


def test_the_kl_is_the_same_each_time_and_takes_no_random_number():
    blora = tiny.adapted(num_data=10)
    before = torch.get_rng_state()
    assert blora.kl() == blora.kl()
    assert torch.equal(torch.get_rng_state(), before)
