"""The temperature of the average of draws, and the examples that set it and teach nothing else."""

import warnings

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from scipy.optimize import minimize_scalar
from torch.utils.data import DataLoader, IterableDataset, default_collate

from pyro_blora import BayesianLoRA, fit, guides
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods import CausalLM, MultipleChoice
from pyro_blora.posterior.temperature import temperature_of_draws

N = 16
COLLATED = {"data_collator": default_collate}


def adapter(num_data=N, **options):
    torch.manual_seed(0)
    return tiny.adapted(tiny.llama(), likelihood=MultipleChoice(num_data=num_data), **options)


def items(count=N):
    """Items of one option fewer each, so that batches have absent options."""
    batch = tiny.choices(count, 3, seed=3)
    batch["labels"] = torch.zeros_like(batch["labels"])
    for key in MultipleChoice.keys:
        batch[key][::2, -1] = 0
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def temperature_of(logits, labels):
    return temperature_of_draws(MultipleChoice(), [(logits, labels)])


def loss(temperature, logits, labels):
    """Written out in numpy: the average's NLL, and half the square of log T."""
    scores = np.exp(logits / temperature)
    average = (scores / scores.sum(-1, keepdims=True)).mean(0)
    nll = -np.log(average[np.arange(len(labels)), labels]).sum()
    return nll + 0.5 * np.log(temperature) ** 2


@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("draws", [1, 5])
def test_it_minimizes_the_loss_of_the_average(scale, draws):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(200, 4, generator=generator)
    labels = mean.softmax(-1).multinomial(1, generator=generator)[:, 0]
    logits = scale * (mean + 0.5 * torch.randn(draws, 200, 4, generator=generator))
    arrays = logits.double().numpy(), labels.numpy()
    best = minimize_scalar(lambda t: loss(np.exp(t), *arrays), bounds=(-3, 3), method="bounded")
    assert temperature_of(logits, labels) == pytest.approx(np.exp(best.x), rel=2e-3)
    # absent options change nothing
    padded = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    assert temperature_of(padded, labels) == temperature_of(logits, labels)


def test_a_few_labels_move_it_little():
    with pytest.raises(ValueError, match="look for NaN"):
        temperature_of(torch.tensor([[[0.0, -torch.inf]]]), torch.tensor([1]))
    logits = torch.tensor([[[3.0, 0.0], [3.0, 0.0]]])
    right, wrong = (temperature_of(logits, torch.full((2,), k)) for k in (0, 1))
    assert 0.5 < right < 1 < wrong < 4
    assert temperature_of(torch.zeros(2, 3, 4), torch.zeros(3).long()) == 1


@pytest.mark.parametrize("way", ["fit", "Laplace", "trainer"])
def test_the_examples_held_out_teach_nothing_and_the_others_have_the_elbo_of_their_number(way):
    held, every = {0, 1, 6, 8}, items()  # by the hash of their tokens
    data = [item for i, item in enumerate(every) if i not in held]
    parts = {"guide": guides.Laplace()} if way == "Laplace" else {}
    one, other = adapter(**parts), adapter(N - 4, **parts)
    if way == "trainer":
        options = {"max_steps": 4, "per_device_train_batch_size": 4, **COLLATED}
        for blora, rows, share in ((one, every, 0.25), (other, data, 0.0)):
            tiny.trainer("unused", blora, rows, held_out=share, **options).train()
    else:
        options = {"num_steps": 4, "batch_size": 4, "progress": False}
        fit(one, every, held_out=0.25, **options)
        fit(other, data, held_out=0.0, **options)
    assert other.model.temperature == 1
    other.calibrate([every[i] for i in sorted(held)])
    assert float(one.model.temperature) != 1
    theirs = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_predictions_have_it_and_so_does_what_is_saved(tmp_path):
    blora, batch = adapter(guide=guides.MatrixNormal(init_scale=0.5)), tiny.choices(4)
    torch.manual_seed(3)
    draws, mean = blora.predict(batch, 4).samples, blora.predict(batch, 0).probs
    with blora.disable_adapter():
        bare = blora.predict(batch, 0).probs
    given = {name: values[None] for name, values in blora.guide().items()}
    sampled = blora.predict(batch, samples=given).samples
    blora.calibrate(items(), num_samples=4)
    temperatures = blora.model.temperature, blora.model.mean_temperature
    assert len({float(t) for t in temperatures}) == 2
    torch.manual_seed(3)
    after = blora.predict(batch, 4).samples, blora.predict(batch, 0).probs
    for found, before, temperature in zip(after, (draws, mean), temperatures, strict=True):
        torch.testing.assert_close(found, (before.log() / temperature).softmax(-1))
    with blora.disable_adapter():
        assert torch.equal(blora.predict(batch, 0).probs, bare)
    assert torch.equal(blora.predict(batch, samples=given).samples, sampled)
    expected = -blora.predict(batch, 0).probs.gather(1, batch["labels"][:, None]).log().mean()
    torch.testing.assert_close(-blora.log_predictive(batch, 0).mean(), expected)
    blora.save_pretrained(tmp_path / "new")
    read = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path / "new")
    assert (read.model.temperature, read.model.mean_temperature) == temperatures
    fit(read, items(), num_steps=1, held_out=0.0, progress=False)
    assert read.model.temperature == read.model.mean_temperature == 1


class Stream(IterableDataset):
    def __len__(self):
        return N

    def __iter__(self):
        return iter(items())


def test_a_trainer_holds_out_nothing_of_a_stream_or_before_a_width_is_found():
    options = {"max_steps": 1, **COLLATED}
    with pytest.warns(UserWarning, match="need a temperature"):
        tiny.trainer("unused", adapter(), Stream(), **options)
    made = tiny.trainer("unused", adapter(guide=guides.Laplace()), items(), **options)
    assert len(made.train_dataset) == N
    columns = Dataset.from_list([{"labels": k, "length": k} for k in range(N)])
    made = tiny.trainer("unused", adapter(), columns, **options)
    assert made.train_dataset.column_names == ["labels", "length"]
    assert len(made.train_dataset) == N - 2


def test_what_cannot_be_held_out_is_not():
    loader = DataLoader(items(), 4)
    blora = adapter()
    with pytest.warns(UserWarning, match="The scores of MultipleChoice need a temperature"):
        fit(blora, loader, num_steps=1, progress=False)
    assert blora.model.temperature == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(blora, loader, num_steps=1, held_out=0.0, progress=False)
    with pytest.raises(ConfigurationError, match=r"held_out=0.5 must have rows and a likelihood"):
        fit(blora, loader, num_steps=1, held_out=0.5, progress=False)
    with pytest.raises(ConfigurationError, match=r"held_out must be a share in \[0, 1\), got 1"):
        fit(blora, items(), num_steps=1, held_out=1.0, progress=False)
    with pytest.raises(BatchError, match="must have labels to calibrate by"):
        blora.calibrate([{k: v for k, v in item.items() if k != "labels"} for item in items(2)])
    blora.unwrap()
    text = tiny.adapted(tiny.llama(), likelihood=CausalLM(num_data=N))
    with pytest.raises(ConfigurationError, match="calibrate must have a likelihood of labels"):
        text.calibrate(items())
