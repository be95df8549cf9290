"""Spoiled checkpoints: nothing of them is executed, and nothing is loaded by half."""

import copy
import json
import random
import shutil
import sys
import warnings

import pyro
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_formats import FORMATS, base

from pyro_blora import BayesianLoRA
from pyro_blora.checkpoints import CONFIG, WEIGHTS
from pyro_blora.errors import CheckpointError

EVIL = [
    {"name": "Trap", "module": "canary", "options": {}},
    {"name": "os.system", "module": "os", "options": {"command": "true"}},
    {"name": "guides.system", "options": {}},
    {"name": "__class__.__base__", "options": {}},
    {"name": "UpdateModel", "options": {}},
    *(None, True, -1, 10**30, 1e308, float("nan"), "", "x" * 999, [], {}, [[1]], {"a": {}}),
]


def bytewise(rng, data):
    """Cut, doubled, flipped, overwritten, or with something in between."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    noise = rng.randbytes(rng.randint(1, 8))
    flipped = bytearray(data)
    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return rng.choice(
        [
            bytes(flipped),
            data[:at],
            data[at:],
            data[:at] + data[end:],
            data[:end] + data[at:],
            data[:at] + noise + data[at:],
            data[:at] + noise + data[at + len(noise) :],
            noise,
            b"",
            b"[" * 100_000,
        ]
    )


def places(node, path=()):
    for key, child in node.items() if isinstance(node, dict) else ():
        yield (*path, key)
        yield from places(child, (*path, key))


def meant(rng, config, *, signed):
    """The JSON with a value of another kind, or without it; and without its checksum, or not."""
    config = copy.deepcopy(config)
    *above, last = rng.choice(list(places(config)))
    node = config
    for key in above:
        node = node[key]
    if rng.random() < 0.2:
        del node[last]
    else:
        node[last] = rng.choice(EVIL)
    if not signed:
        config.pop("sha256", None)
    return json.dumps(config).encode()


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that says when it is imported."""
    (tmp_path / "canary.py").write_text("open(__file__ + '.sung', 'w')\nTrap = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert "canary" not in sys.modules
    assert not list(tmp_path.glob("*.sung"))


def outcome(net, folder):
    """``None`` where it is refused; else the adapter's tensors and what it says of itself."""
    pyro.clear_param_store()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            blora = BayesianLoRA.from_pretrained(net, folder)
    except CheckpointError as error:
        told = str(error)
    else:
        loaded = copy.deepcopy(blora.state_dict()), repr(blora)
        blora.unwrap()
        return loaded
    assert len(told.splitlines()) == 1
    assert not any(m._forward_hooks for m in net.modules())
    return None


def fuzzed(net, source, work, count, mutate):
    """Loads ``count`` spoiled copies of a folder; gives what came of those that were read."""
    rng, read = random.Random(0), []
    for _ in range(count):
        shutil.copytree(source, work)
        mutate(rng, work)
        loaded = outcome(net, work)
        if loaded is not None:
            read.append((*loaded, load_file(work / WEIGHTS)))
        shutil.rmtree(work)
    return read


@pytest.mark.usefixtures("canary")
def test_a_spoiled_checkpoint_is_refused_or_is_equal(tmp_path):
    net, source = base(), FORMATS / "2"
    whole, config = outcome(net, source), json.loads((source / CONFIG).read_text())

    def mutate(rng, folder):
        path = folder / rng.choice([CONFIG, WEIGHTS])
        data = path.read_bytes()
        if path.name == CONFIG and rng.random() < 0.5:
            path.write_bytes(meant(rng, config, signed=True))
        elif rng.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(bytewise(rng, data))

    read = fuzzed(net, source, tmp_path / "a", 500, mutate)
    assert len(read) < 50
    for tensors, told, _ in read:
        assert tiny.equal(tensors, whole[0])
        assert told == whole[1]


@pytest.mark.usefixtures("canary")
def test_one_without_a_checksum_is_refused_or_read_whole(tmp_path):
    """So are all of format 1, and those that were changed by hand."""
    net, source = base(), FORMATS / "2"
    config = json.loads((source / CONFIG).read_text())

    def mutate(rng, folder):
        if rng.random() < 0.7:
            (folder / CONFIG).write_bytes(meant(rng, config, signed=False))
            return
        (folder / CONFIG).write_text(json.dumps({**config, "sha256": ""}))
        path = folder / WEIGHTS
        path.write_bytes(bytewise(rng, path.read_bytes()))

    read = fuzzed(net, source, tmp_path / "a", 200, mutate)
    assert 0 < len(read) < 150
    for tensors, _, in_file in read:
        own = {n: t for n, t in in_file.items() if not n.startswith("base.")}
        for name in [n for n in own if "score_scale" in n]:  # a logarithm, in this format
            own[name.replace("scale", "slope")] = own.pop(name).exp()
        assert all(torch.equal(tensors[name], own[name]) for name in own)
