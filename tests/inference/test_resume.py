"""A run that was stopped goes on as if there had been no stop."""

import json
import os
import random
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pyro
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

from pyro_blora import files
from pyro_blora.checkpoints.checkpoint import read_tensors
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import Ensemble, Laplace
from pyro_blora.inference.loop import held_interrupts
from pyro_blora.inference.resume import STATE
from pyro_blora.likelihoods import MultipleChoice, SequenceClassification
from pyro_blora.models import GaussianFactors, KroneckerInducing

pytestmark = pytest.mark.usefixtures("interruptible")

# Labels that training contradicts, so that an early validation is the best one
CONTRARY = [{**row, "label": (row["label"] + 1) % 3} for row in tiny.examples(6)]
BEST = {"validation": CONTRARY, "validate_every": 2, "keep_best": True, "learning_rates": 0.2}
llama = partial(tiny.adapted, num_data=10)


def bert(**parts):
    likelihood = SequenceClassification(num_data=10)
    return tiny.adapted(tiny.bert(), target_modules=None, likelihood=likelihood, **parts)


def multiple_choice(**parts):
    """Whose scale of the scores learns from items of its own."""
    return tiny.adapted(likelihood=MultipleChoice(num_data=10), **parts)


def dropping(**parts):
    """Attention drops out in training, by torch's global random numbers."""
    return tiny.adapted(tiny.llama(attention_dropout=0.3), num_data=10, **parts)


def loader(**options):
    return DataLoader(tiny.examples(10), 4, shuffle=True, collate_fn=tiny.collate, **options)


def loader_of_its_own():
    return loader(generator=torch.Generator().manual_seed(9))


def choices():
    rows = tiny.choices(10)
    return [{key: value[i] for key, value in rows.items()} for i in range(10)]


CASES = {
    "early best": (llama, {}, BEST),
    "held out": (multiple_choice, {}, {"rows": choices, "collate": None}),
    "ensemble": (llama, {"guide": Ensemble(members=3)}, BEST),
    "autoguide": (llama, {"guide": AutoNormal}, {"decay": "cosine"}),
    "shuffled by torch": (dropping, {}, {"rows": loader, "seed": None}),
    "shuffled by its own": (llama, {}, {"rows": loader_of_its_own}),
    "post-hoc": (llama, {"guide": Laplace()}, {"num_particles": 1}),
    "head": (bert, {}, BEST),
}


def steps_in(path):
    return len(json.loads(read_tensors(path)[0]["training"])["history"]) if path.exists() else 0


def stop_after(step):
    """A callback that presses Ctrl-C in the middle of the last step."""
    return lambda done: os.kill(os.getpid(), signal.SIGINT) if done.step == step else None


def anew(make, parts, seed=1):
    """As in another process: the same network, an adapter with another start."""
    pyro.set_rng_seed(seed)
    made = make(**parts)
    with torch.no_grad():  # the network of the first
        generator = torch.Generator().manual_seed(5)
        for parameter in made.net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def outcome(blora, result):
    """All that a run leaves, the next random numbers included."""
    best = {f"best.{name}": t for name, t in (result.best_state or {}).items()}
    kept = {"next": torch.rand(2), **blora.state_dict(), **best}
    return kept, (result.history, result.validation, result.best_step, random.random())


def same(found, expected):
    return tiny.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_with_the_same_bits(tmp_path, case):
    """Of two and a half epochs, stopped in each of them and at the end of the first."""
    make, parts, options = CASES[case]
    rows = options.get("rows", lambda: None)
    options = {"num_steps": 8, **{n: v for n, v in options.items() if n != "rows"}}
    blora = anew(make, parts)
    expected = outcome(blora, tiny.train(blora, rows(), **options))
    kept = {**options, "checkpoint_dir": tmp_path / "run", "resume": True}
    blora = anew(make, parts)
    for seed, step in ((2, 2), (3, 3), (4, 7)):
        with pytest.raises(KeyboardInterrupt, match=rf"after step {step} of 8.*resume=True goes"):
            tiny.train(blora, rows(), callback=stop_after(step), **kept)
        blora = anew(make, parts, seed)
    assert same(outcome(blora, tiny.train(blora, rows(), **kept)), expected)
    assert tiny.written(tmp_path / "run") == {STATE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that was stopped after three of six steps."""
    folder = tmp_path_factory.mktemp("stopped")
    options = {"validation": CONTRARY, "precision": "float32", "callback": stop_after(3)}
    with pytest.raises(KeyboardInterrupt):
        tiny.train(anew(llama, {}), checkpoint_dir=folder, **options)
    return folder


@pytest.fixture
def stopped(folder, tmp_path):
    """A copy of it."""
    return shutil.copytree(folder, tmp_path / "run")


def test_a_finished_run_returns_at_once_or_goes_on(stopped):
    options = {"checkpoint_dir": stopped, "resume": True, "validation": CONTRARY}
    blora = anew(llama, {}, 2)
    expected = outcome(blora, tiny.train(blora, **options))
    again = anew(llama, {}, 3)
    again.model.register_forward_pre_hook(lambda *_: pytest.fail("it trains"))
    assert same(outcome(again, tiny.train(again, **options)), expected)
    blora = anew(llama, {}, 4)
    result = tiny.train(blora, **{**options, "num_steps": 9})
    assert result.history[:6] == expected[1][0]
    assert len(result.history) == steps_in(stopped / STATE) == 9
    with pytest.raises(ConfigurationError, match=r"num_steps must be at least the 9.*got 8"):
        tiny.train(anew(llama, {}), **{**options, "num_steps": 8})


def test_a_run_that_stopped_early_has_ended_unless_it_may_go_on(tmp_path):
    """It is stopped between the two validations that its patience counts."""
    options = {**BEST, "num_steps": 12, "learning_rates": 1.0}
    expected = outcome(blora := anew(llama, {}), tiny.train(blora, **options))
    options |= {"patience": 2, "checkpoint_dir": tmp_path, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        tiny.train(anew(llama, {}), callback=stop_after(9), **options)
    result = tiny.train(blora := anew(llama, {}, 2), **options)
    early = outcome(blora, result)
    assert result.stopped_early
    assert (result.best_step, len(result.history)) == (6, 10)
    again = anew(llama, {}, 3)
    again.model.register_forward_pre_hook(lambda *_: pytest.fail("it trains"))
    assert same(outcome(again, tiny.train(again, **options)), early)
    blora = anew(llama, {}, 4)
    assert same(outcome(blora, tiny.train(blora, **{**options, "patience": None})), expected)


def by_group():
    prior = {"q_proj": GaussianFactors(rank=2, sigma=5.0), ".*": KroneckerInducing(rank=2)}
    return llama(prior=prior)


def other_base():
    blora = anew(llama, {})
    with torch.no_grad():
        blora.net.model.norm.weight.mul_(2)
    return blora


OTHER = {
    "rate": (llama, {"learning_rates": 0.1}, r"learning_rates was .*0\.05, .*, is .*0\.1, "),
    "data": (llama, {"rows": tiny.examples(9)}, "training data was 10, is 9"),
    "validation": (llama, {"validation": None}, "validation was 6, is None"),
    "rank": (lambda: llama(rank=3), {}, r"prior\.rank was 2, is 3"),
    "guide": (lambda: llama(guide=AutoNormal), {}, "guide was MatrixNormal, is AutoNormal"),
    "layers": (lambda: llama(tiny.llama(3)), {}, r"layer .*2\.self_attn\.q_proj was absent, is \["),
    "prior of a group": (by_group, {}, "prior was KroneckerInducing, is absent"),
    "precision": (llama, {"precision": "bfloat16"}, "precision was float32, is bfloat16"),
    "base": (other_base, {}, r"the base has other weights, among them model\.norm\.weight"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_run_is_told_from_it(stopped, case):
    make, options, told = OTHER[case]
    options = {"validation": CONTRARY, "checkpoint_dir": stopped, "resume": True, **options}
    blora = make() if make is other_base else anew(make, {})
    before = {name: tensor.clone() for name, tensor in blora.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{STATE} is of another run: .*{told}") as error:
        tiny.train(blora, options.pop("rows", None), **options)
    assert "\n" not in str(error.value)
    assert case == "guide" or tiny.equal(blora.state_dict(), before)
    assert steps_in(stopped / STATE) == 3


def test_a_head_that_is_trained_is_no_part_of_the_base(tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": True}
    tiny.train(anew(bert, {}), num_steps=2, **options)
    again = anew(bert, {}, 2)
    with torch.no_grad():
        again.net.classifier.weight.mul_(2)
    assert len(tiny.train(again, num_steps=3, **options).history) == 3


def test_auto_is_the_precision_that_it_was(stopped, monkeypatch):
    monkeypatch.setattr("pyro_blora.options._bfloat16_pays", lambda kind: True)
    blora, seen = anew(llama, {}), []
    blora.net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    tiny.train(blora, checkpoint_dir=stopped, resume=True, validation=CONTRARY)
    assert set(seen) == {False}


def test_what_cannot_be_is_told_before_the_first_step(stopped):
    with pytest.raises(CheckpointError, match=r"exists already.*resume=True"):
        tiny.train(anew(llama, {}), checkpoint_dir=stopped)
    assert steps_in(stopped / STATE) == 3
    path = stopped / STATE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{STATE} cannot be read"):
        tiny.train(anew(llama, {}), checkpoint_dir=stopped, resume=True)
    with pytest.raises(ConfigurationError, match="resume=True needs checkpoint_dir="):
        tiny.train(llama(), resume=True)
    with pytest.raises(ConfigurationError, match=r"test_resume\.py must be a folder that can be"):
        tiny.train(llama(), checkpoint_dir=__file__, callback=lambda step: pytest.fail("it trains"))


def test_the_second_interrupt_does_not_wait():
    with held_interrupts() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_it_trains_and_saves_too(tmp_path):
    options = {"checkpoint_dir": tmp_path, "save_every": 4}
    thread = threading.Thread(target=tiny.train, args=(anew(llama, {}),), kwargs=options)
    thread.start()
    thread.join()
    assert steps_in(tmp_path / STATE) == 6


class Killed(BaseException):
    """Which nothing catches."""


@pytest.mark.parametrize(
    ("step", "owner", "name", "left"),
    [(2, Path, "replace", 0), (2, files, "claim", 2), (4, Path, "replace", 2)],
)
def test_a_kill_within_a_save_leaves_a_state_to_go_on_from(step, owner, name, left, tmp_path):
    """Before the first file is in its place, before it is claimed, and before the second."""
    expected = outcome(blora := anew(llama, {}), tiny.train(blora))
    kept = {"checkpoint_dir": tmp_path / "run", "save_every": 2, "resume": True}

    def kill(*_):
        raise Killed

    def arm(done):
        if done.step == step:  # which is saved after this
            patch.setattr(owner, name, kill)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        tiny.train(anew(llama, {}), callback=arm, **kept)
    assert steps_in(tmp_path / "run" / STATE) == left
    blora = anew(llama, {}, 2 if left else 1)
    assert same(outcome(blora, tiny.train(blora, **kept)), expected)
