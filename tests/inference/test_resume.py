"""A run that was stopped goes on as if there had been no stop."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import kills
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import Amortized, Ensemble, Laplace, MatrixNormal, MeanField
from pyro_blora.inference import fit
from pyro_blora.inference.loop import held_interrupts
from pyro_blora.inference.training_state import PREFIX, STATE
from pyro_blora.likelihoods import LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.models import FisherInducing, KroneckerInducing
from pyro_blora.network import precision

pytestmark = pytest.mark.usefixtures("interruptible")

# Labels that training contradicts, so that an early validation is the best one
CONTRARY = [{**row, "label": (row["label"] + 1) % 3} for row in tiny.examples(6)]
BEST = {"validation": CONTRARY, "validate_every": 2, "keep_best": True, "lr_mean": 0.2}
TOP = {"layers_to_transform": [1]}


def length(row):
    return len(row["input_ids"])


def bert(**parts):
    likelihood = SequenceClassification(num_data=10)
    return tiny.adapted(tiny.bert(), target_modules=None, likelihood=likelihood, **parts)


def multiple_choice(**parts):
    """Whose scale of the scores learns from items of its own."""
    return tiny.adapted(likelihood=MultipleChoice(num_data=10), **parts)


def gpt2(**parts):
    return tiny.adapted(tiny.gpt2(), target_modules=["c_attn"], num_data=10, **parts)


def dropping(**parts):
    """Attention drops out in training, by torch's global random numbers."""
    return tiny.adapted(tiny.llama(attention_dropout=0.3), num_data=10, **parts)


def llama(**parts):
    return tiny.adapted(num_data=10, **parts)


def loader():
    return DataLoader(tiny.examples(10), 4, shuffle=True, collate_fn=tiny.collate)


def loader_of_its_own():
    generator = torch.Generator().manual_seed(9)
    rows = tiny.examples(10)
    return DataLoader(rows, 4, shuffle=True, collate_fn=tiny.collate, generator=generator)


def loader_of_choices():
    rows = tiny.choices(10)
    return DataLoader([{k: v[i] for k, v in rows.items()} for i in range(10)], 4, shuffle=True)


CASES = {
    "early best": (llama, {}, {**BEST, "length": length}),
    "likelihood": (multiple_choice, {}, {"rows": loader_of_choices}),
    "informed": (llama, {"prior": FisherInducing(rank=2)}, {}),
    "amortized": (llama, {"guide": Amortized(hidden=3)}, {"decay": "cosine"}),
    "ensemble": (llama, {"guide": Ensemble(members=3)}, BEST),
    "dropout": (dropping, {"guide": MeanField(), **TOP}, {}),
    "autoguide": (llama, {"guide": AutoNormal}, {"max_grad_norm": None}),
    "shuffled by torch": (llama, {}, {"rows": loader, "seed": None}),
    "shuffled by its own": (llama, {}, {"rows": loader_of_its_own}),
    "post-hoc": (llama, {"guide": Laplace()}, {"num_particles": 1}),
    "head": (bert, {"guide": MatrixNormal()}, BEST),
    "Conv1D": (gpt2, {"prior": KroneckerInducing(rank=2, noise="joint")}, {}),
}


def stop_after(step):
    """A callback that presses Ctrl-C in the middle of the last step."""
    return lambda done: os.kill(os.getpid(), signal.SIGINT) if done == step else None


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
@pytest.mark.usefixtures("steady")
def test_it_goes_on_with_the_same_bits(run, tmp_path, case):
    """Of two and a half epochs, stopped in each of them and at the end of the first."""
    make, parts, options = CASES[case]
    rows = options.get("rows", lambda: None)
    options = {"num_steps": 8, **{n: v for n, v in options.items() if n != "rows"}}
    blora = anew(make, parts)
    expected = outcome(blora, run(blora, rows(), **options))
    kept = {**options, "checkpoint_dir": tmp_path / "run", "resume": True}
    blora = anew(make, parts)
    for seed, step in ((2, 2), (3, 3), (4, 7)):
        with pytest.raises(KeyboardInterrupt, match=rf"after step {step} of 8.*resume=True goes"):
            run(blora, rows(), callback=stop_after(step), **kept)
        blora = anew(make, parts, seed)
    assert same(outcome(blora, run(blora, rows(), **kept)), expected)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name not in (STATE, PREFIX)]


@pytest.fixture
def steady():
    """Python's own random numbers as before."""
    before = random.getstate()
    yield
    random.setstate(before)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, interruptible):
    folder = tmp_path_factory.mktemp("stopped")
    options = {"collate": tiny.collate, "num_steps": 6, "batch_size": 4, "progress": False}
    options |= {"validation": CONTRARY, "precision": "float32"}
    blora = anew(llama, {})
    with pytest.raises(KeyboardInterrupt):
        fit(blora, tiny.examples(10), checkpoint_dir=folder, callback=stop_after(3), **options)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The folder of a run that was stopped after three of six steps."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def steps_in(folder):
    return len(load_file(folder / STATE)["history.loss"])


def test_a_finished_run_returns_at_once_or_goes_on(run, stopped):
    options = {"checkpoint_dir": stopped, "resume": True, "validation": CONTRARY}
    blora = anew(llama, {}, 2)
    expected = outcome(blora, run(blora, **options))
    again = anew(llama, {}, 3)
    again.model.register_forward_pre_hook(lambda *_: pytest.fail("it trains"))
    assert same(outcome(again, run(again, **options)), expected)
    blora = anew(llama, {}, 4)
    result = run(blora, **{**options, "num_steps": 9})
    assert result.history[:6] == expected[1][0]
    assert len(result.history) == steps_in(stopped) == 9
    with pytest.raises(ConfigurationError, match=r"num_steps=8.* has 9 already"):
        run(anew(llama, {}), **{**options, "num_steps": 8})


def wider():
    return tiny.adapted(tiny.llama(3), num_data=10)


OTHER = {
    "seed": (llama, {"seed": 1}, "seed was 0, is 1"),
    "batch size": (llama, {"batch_size": 5}, "batch_size was 4, is 5"),
    "rate": (llama, {"lr_mean": 0.1}, r"lr_mean was None, is 0\.1"),
    "data": (llama, {"rows": tiny.examples(9)}, r"training data was 10 examples \(.*is 9 exam"),
    "other data": (
        llama,
        {"rows": tiny.examples(10, seed=1)},
        r"training data was 10 examples \(\w+\), is 10 examples \(",
    ),
    "validation": (llama, {"validation": CONTRARY[:5]}, r"validation was 6 ex.*, is 5 ex"),
    "no validation": (llama, {"validation": None}, r"validation was 6 ex.*, is None"),
    "prior": (lambda: llama(prior=FisherInducing(rank=2)), {}, "prior was Kron.*, is FisherInduci"),
    "rank": (lambda: llama(rank=3), {}, r"prior\.rank was 2, is 3"),
    "guide": (lambda: llama(guide=AutoNormal), {}, "guide was MatrixNormal, is AutoNormal"),
    "its option": (
        lambda: llama(guide=MatrixNormal(init_scale=0.3)),
        {},
        r"guide\.init_scale was 0\.1, is 0\.3",
    ),
    "likelihood": (
        lambda: tiny.adapted(likelihood=LabelTokens(token_ids=(5, 6, 8), num_data=10)),
        {},
        r"likelihood\.token_ids was \[5, 6, 7\], is \[5, 6, 8\]",
    ),
    "layers": (wider, {}, r"layer model\.layers\.2\.self_attn\.q_proj was absent, is \[16, 16\]"),
    "fewer layers": (
        lambda: llama(layers_to_transform=[0]),
        {},
        r"layers\.1\.self_attn\.q_proj was \[16, 16\], is absent",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_run_is_told_from_it(run, stopped, case):
    make, options, told = OTHER[case]
    options = {"validation": CONTRARY, "checkpoint_dir": stopped, "resume": True, **options}
    blora = anew(make, {})
    before = blora.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(CheckpointError, match=rf"{STATE} is of another run: .*{told}") as error:
        run(blora, options.pop("rows", None), **options)
    assert "\n" not in str(error.value)
    assert case in ("guide",) or tiny.equal(blora.state_dict(), before)
    assert steps_in(stopped) == 3


def laplace_of(scale):
    return lambda shape: dist.Laplace(0.0, scale).expand(shape).to_event(len(shape))


def prior_of(scale):
    return {"prior": KroneckerInducing(rank=2, core=laplace_of(scale))}


def guide_of(scale):
    return {"guide": lambda model: AutoNormal(model, init_scale=scale)}


def partial_of(scale):
    return {"guide": partial(AutoNormal, init_scale=scale)}


@pytest.mark.parametrize("parts", [prior_of, guide_of, partial_of])
def test_another_function_is_told_from_it(run, tmp_path, parts):
    """By what the function does: all of these have one name."""
    options = {"checkpoint_dir": tmp_path, "resume": True, "num_steps": 2}
    run(anew(llama, parts(0.1)), **options)
    run(anew(llama, parts(0.1)), **options)
    with pytest.raises(CheckpointError, match=r"(prior\.core|guide) was .* \(\w+\), is .* \(\w+\)"):
        run(anew(llama, parts(0.2)), **options)


def test_a_collator_that_draws_is_asked_with_one_seed(run, tmp_path):
    """And what it draws for the digest does not move the run."""

    def collate(rows):
        batch, kept = tiny.collate(rows), torch.rand(1) + random.random() > 0
        return {**batch, "noise": torch.rand(len(rows)) * kept}

    options = {"collate": collate, "num_steps": 3}
    expected = run(anew(llama, {}), **options).history
    assert run(anew(llama, {}), checkpoint_dir=tmp_path, **options).history == expected
    assert run(anew(llama, {}), checkpoint_dir=tmp_path, resume=True, **options).history == expected


def test_another_base_is_told_from_it(run, stopped):
    blora = anew(llama, {})
    before = {name: tensor.clone() for name, tensor in blora.state_dict().items()}
    with torch.no_grad():
        blora.net.model.norm.weight.mul_(2)
    told = rf"{STATE} is of another run: of its base, 1 of the \d+ weights.*model\.norm\.weight"
    with pytest.raises(CheckpointError, match=rf"{told}\. Load the base that it began") as error:
        run(blora, checkpoint_dir=stopped, resume=True, validation=CONTRARY)
    assert "\n" not in str(error.value)
    assert tiny.equal(blora.state_dict(), before)


def test_a_head_that_is_trained_is_no_part_of_the_base(run, tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": True}
    run(anew(bert, {}), num_steps=2, **options)
    again = anew(bert, {}, 2)
    with torch.no_grad():
        again.net.classifier.weight.mul_(2)
    assert len(run(again, num_steps=3, **options).history) == 3


def test_auto_is_the_precision_that_it_was(run, stopped, monkeypatch):
    monkeypatch.setattr(precision, "_bfloat16_pays", lambda kind: True)
    options = {"checkpoint_dir": stopped, "resume": True, "validation": CONTRARY}
    with pytest.raises(CheckpointError, match="precision was float32, is bfloat16"):
        run(anew(llama, {}), precision="bfloat16", **options)
    blora, seen = anew(llama, {}), []
    blora.model.register_forward_pre_hook(lambda model, _: seen.append(model.precision))
    run(blora, **options)
    assert seen == ["float32"] * 3


def test_a_state_is_not_written_over(run, stopped):
    with pytest.raises(CheckpointError, match=r"is there already.*resume=True"):
        run(anew(llama, {}), checkpoint_dir=stopped)
    assert steps_in(stopped) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"resume": True}, "resume=True needs checkpoint_dir="),
        ({"save_every": 0}, "save_every=0 must be at least 1"),
        ({"checkpoint_dir": __file__}, "checkpoint_dir='.*test_resume.py' cannot be written to"),
    ],
)
def test_options_out_of_range(run, options, told):
    with pytest.raises(ConfigurationError, match=told):
        run(llama(), **options)


def changed(**given):
    """Rewrites some of the tensors, and of the notes by a function of them."""

    def change(path):
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["training"])
        tensors = load_file(path)
        for name, value in given.items():
            if callable(value):
                value(notes, tensors)
            else:
                tensors[name] = value
        save_file(tensors, path, metadata={"training": json.dumps(notes)})

    return change


FIRST = "adapter.model.q_proj.Z_r_unconstrained"
MOMENT = "optimizer.model.q_proj.Z_r_unconstrained.exp_avg"
FIGURES = ("loss", "nll", "kl")
BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "pickled": lambda path: torch.save({"a": torch.ones(1)}, path),
    "no notes": lambda path: save_file(load_file(path), path),
    "no adapter": changed(drop=lambda notes, tensors: tensors.pop(FIRST)),
    "another shape": changed(**{FIRST: torch.ones(3)}),
    "not finite": changed(**{FIRST: torch.full((2, 2, 16), torch.nan)}),
    "moments": changed(**{MOMENT: torch.ones(3)}),
    "unknown moments": changed(**{"optimizer.model.other.exp_avg": torch.ones(3)}),
    "torch's numbers": changed(**{"random.torch": torch.ones(7, dtype=torch.uint8)}),
    "their epoch's": changed(**{"stream.torch": torch.ones(7)}),
    "Python's numbers": changed(of=lambda notes, _: notes["random"]["python"].pop()),
    "order": changed(of=lambda notes, _: notes["stream"].pop("order")),
    "validation": changed(of=lambda notes, _: notes.update(validation=[[1]])),
    "no history": changed(of=lambda _, tensors: [tensors.pop(f"history.{k}") for k in FIGURES]),
    "a moment": changed(of=lambda _, tensors: tensors.pop(MOMENT)),
    "steps": changed(of=lambda notes, _: notes.update(steps="x")),
    "a column": changed(**{"history.kl": torch.ones(2)}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_state_is_refused_whole(run, stopped, case):
    BROKEN[case](stopped / STATE)
    blora = anew(llama, {}, 2)
    before = {name: tensor.clone() for name, tensor in blora.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{STATE} is corrupt or incomplete") as error:
        run(blora, checkpoint_dir=stopped, resume=True, validation=CONTRARY)
    assert "\n" not in str(error.value)
    assert tiny.equal(blora.state_dict(), before)


def test_a_later_format_says_so(run, stopped):
    changed(of=lambda notes, _: notes.update(format=9))(stopped / STATE)
    with pytest.raises(CheckpointError, match="has format 9"):
        run(anew(llama, {}), checkpoint_dir=stopped, resume=True, validation=CONTRARY)


def test_the_second_interrupt_does_not_wait():
    with held_interrupts() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_it_trains_and_saves_too(run, tmp_path):
    options = {"checkpoint_dir": tmp_path, "save_every": 4}
    thread = threading.Thread(target=run, args=(anew(llama, {}),), kwargs=options)
    thread.start()
    thread.join()
    assert steps_in(tmp_path) == 6


def test_kills_lose_no_more_than_the_steps_since_the_last_save(tmp_path):
    """``kill -9`` at random moments of one run, by a process that forks it again and again."""
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(tiny.__file__).parent)))
    done = subprocess.run(
        [sys.executable, kills.__file__, str(tmp_path), "6"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == report["survived"] == 6, report
    assert report["most steps lost"] <= kills.SAVE_EVERY
    assert report["same bits"]
