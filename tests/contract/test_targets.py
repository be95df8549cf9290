"""Which layers are adapted, and how they are grouped."""

from functools import partial

import pytest
import tiny
import torch
from torch import nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.targets import find_targets, group_layers


def endings(names):
    return [name.rsplit(".", 1)[-1] for name in names]


@pytest.mark.parametrize(
    ("build", "expected"),
    [(tiny.llama, ["q_proj", "v_proj"]), (tiny.gpt2, ["c_attn"]), (tiny.bert, ["query", "value"])],
)
def test_default_per_architecture(build, expected):
    assert endings(find_targets(build(2))) == 2 * expected


SECOND = "model.layers.1."


@pytest.mark.parametrize(
    ("wanted", "options", "expected"),
    [
        # whole parts of names, in the network's order, not in that of the list
        (["mlp.up_proj", "v_proj"], {}, ["self_attn.v_proj", "mlp.up_proj"]),
        (r".*layers\.1\..*(q|k)_proj", {}, ["self_attn.q_proj", "self_attn.k_proj"]),
        (["q_proj", "v_proj"], {"exclude_modules": ["1.self_attn.q_proj"]}, ["self_attn.v_proj"]),
        ("all-linear", {"exclude_modules": r".*(mlp|[kvo]_proj).*"}, ["self_attn.q_proj"]),
        (["q_proj", "lm_head"], {"layers_to_transform": 1}, ["self_attn.q_proj"]),
        (["q_proj", "lm_head"], {"layers_to_transform": [0, 2]}, []),
    ],
)
def test_which_layers_of_the_second_block(wanted, options, expected):
    names = find_targets(tiny.llama(layers=3), wanted, **options)
    assert [n.removeprefix(SECOND) for n in names if n.startswith(SECOND)] == expected
    assert "lm_head" not in names


def test_all_linear_has_all_but_the_head():
    names = set(endings(find_targets(tiny.llama(tied=True), "all-linear")))
    assert names == {f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")}


NONE = [(["qproj"], {}), (["proj"], {}), ("q_proj", {})]  # whole names, or a regular expression
NONE += [(["q_proj"], {"exclude_modules": ["q_proj"]}), (["q_proj"], {"layers_to_transform": 9})]
NONE += [(None, {"net": nn.Sequential(nn.Linear(4, 3))})]


@pytest.mark.parametrize(("wanted", "options"), NONE)
def test_no_target(wanted, options):
    with pytest.raises(ConfigurationError):
        find_targets(**{"net": tiny.llama(), "target_modules": wanted, **options})


def test_one_of_several_names_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match=r"\['value'\] of target_modules"):
        found = find_targets(tiny.llama(), ["q_proj", "value"])
    assert endings(found) == ["q_proj", "q_proj"]
    for excluded in (["value"], "v_proj"):  # a string is a regular expression for whole names
        with pytest.warns(UserWarning, match=r"\['v\w+'\] of exclude_modules matches no"):
            find_targets(tiny.llama(), ["q_proj"], excluded)


def test_groups_are_layers_of_one_ending_and_shape():
    targets = find_targets(tiny.llama(), ["q_proj", "k_proj"])
    groups = group_layers(targets)
    shapes = [(g.name, g.n, g.d_out, g.d_in) for g in groups]
    assert shapes == [("q_proj", 2, 16, 16), ("k_proj", 2, 8, 16)]
    for group in groups:
        assert all(targets[n] is m for n, m in zip(group.module_names, group.modules, strict=True))
    layers = {f"{i}.q": nn.Linear(d_in, 4) for i, d_in in enumerate((4, 6, 4))}
    layers["0"] = nn.Module()  # as a quantized layer, which declares its features alone
    layers["0"].in_features, layers["0"].out_features = 6, 4
    names = {group.name: group.module_names for group in group_layers(layers)}
    assert names == {"q_4x4": ("0.q", "2.q"), "q_4x6": ("1.q",), "layer": ("0",)}
    c_attn = tiny.gpt2().transformer.h[0].attn.c_attn
    assert c_attn.weight.shape == (16, 48)  # Conv1D: the transpose of Linear's
    assert group_layers({"c_attn": c_attn})[0].d_out == 48


def test_what_was_put_into_the_network_since_stays_as_it_is():
    """The names of its parts may be others by then, and new parts are not frozen or thawed."""
    net = tiny.llama()
    net.model.norm.requires_grad_(False)
    blora = tiny.adapted(net)
    net.model.norm.requires_grad_(True)  # by somebody else
    net.model.embed_tokens.weight = None
    net.value, net.frozen = nn.Linear(4, 1), nn.Linear(4, 1).requires_grad_(False)
    net.model = torch.compile(net.model, backend="eager")
    blora.unwrap()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    left = {name for name, _ in net.named_parameters()} - trained
    assert left == {"model._orig_mod.norm.weight", "frozen.weight", "frozen.bias"}


def test_what_torch_compile_returns_is_refused():
    with pytest.raises(ConfigurationError, match="what it returned"):
        tiny.adapted(torch.compile(tiny.llama(), backend="eager"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_library_keeps_its_forward(when):
    net = tiny.llama()
    layer = net.model.layers[0].self_attn.v_proj
    blora = tiny.adapted(net) if when == "after" else None
    theirs = partial(layer.forward)
    layer.forward = theirs
    blora = blora or tiny.adapted(net)
    assert (layer.forward is theirs) == (when == "after")
    blora.unwrap()
    assert layer.forward is theirs
