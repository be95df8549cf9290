"""Which layers are adapted, and how they are grouped."""

import warnings
from functools import partial

import pytest
import tiny
import torch
from torch import nn

from pyro_blora import BayesianLoRA
from pyro_blora.errors import ConfigurationError, NoTargetError
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.targets import find_targets, group_layers, layer_shape


def last_parts(net, *args, **options):
    return sorted({name.rsplit(".", 1)[-1] for name in find_targets(net, *args, **options)})


class Quantised(nn.Module):
    """Declares its features, and holds no weight of that shape."""

    in_features, out_features = 6, 4


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny.llama, ["q_proj", "v_proj"]),
        (tiny.qwen2, ["q_proj", "v_proj"]),
        (tiny.gpt2, ["c_attn"]),
        (tiny.bert, ["query", "value"]),
    ],
)
def test_default_per_architecture(build, expected):
    found = find_targets(build(layers=3))
    assert sorted({name.rsplit(".", 1)[-1] for name in found}) == expected
    assert len(found) == 3 * len(expected)


def test_no_default():
    with pytest.raises(NoTargetError, match=r"Sequential has none.*\['0'\] or 'all-linear'"):
        find_targets(nn.Sequential(nn.Linear(4, 3)))


def test_suffixes_match_whole_name_parts():
    net = tiny.llama()
    parts = ("self_attn.v_proj", "mlp.up_proj")  # in the network's order, not in that of the list
    names = list(find_targets(net, ["mlp.up_proj", "v_proj"]))
    assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in parts]


def test_regular_expression_matches_the_whole_name():
    net = tiny.llama()
    names = list(find_targets(net, r".*layers\.1\..*(q|k)_proj"))
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]


@pytest.mark.parametrize("tied", [False, True])
def test_head(tied):
    net = tiny.llama(tied=tied)
    assert list(find_targets(net, ["lm_head"])) == ["lm_head"]
    parts = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"  # but no lm_head
    assert last_parts(net, "all-linear") == parts.split()


def test_exclude_modules():
    net = tiny.llama()
    kept = find_targets(net, ["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    assert "model.layers.0.self_attn.q_proj" not in kept
    assert len(kept) == 3
    left = last_parts(net, "all-linear", exclude_modules=r".*\.mlp\..*")
    assert left == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(("index", "expected"), [(1, {1}), ([0, 2], {0, 2})])
def test_layers_to_transform(index, expected):
    net = tiny.llama(layers=3)
    names = find_targets(net, ["q_proj", "lm_head"], layers_to_transform=index)
    assert set(names) == {f"model.layers.{i}.self_attn.q_proj" for i in expected}


LEFT = "matches 2 layers, but "


@pytest.mark.parametrize(
    ("wanted", "options", "told"),
    [
        (["qproj"], {}, r"Did you mean \['.*q_proj.*end in \['down_proj'"),
        (["proj"], {}, "proj"),  # the end of a name, but not of a part
        ("q_proj", {}, "regular expression of whole names; endings go in a list"),
        (["q_proj"], {"exclude_modules": ["q_proj"]}, LEFT + r"exclude_modules.*0\.self_attn\.q"),
        (["q_proj"], {"layers_to_transform": 9}, LEFT + r"layers_.*0\.self_attn\.q"),
    ],
)
def test_no_target(wanted, options, told):
    with pytest.raises(NoTargetError, match=told):
        find_targets(tiny.llama(), wanted, **options)


def test_one_of_several_names_that_matches_nothing_is_told():
    with pytest.warns(UserWarning, match=r"\['value'\] of target_modules matches no linear layer"):
        found = find_targets(tiny.llama(), ["q_proj", "value"])
    assert all(name.endswith("q_proj") for name in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(tiny.llama(), ["q_proj", "v_proj"])
        find_targets(tiny.llama(), None)


def test_shapes():
    assert layer_shape(nn.Linear(6, 4)) == (4, 6)
    assert layer_shape(Quantised()) == (4, 6)
    assert layer_shape(nn.LayerNorm(6)) is None
    c_attn = tiny.gpt2().transformer.h[0].attn.c_attn
    assert c_attn.weight.shape == (16, 48)  # Conv1D: the transpose of Linear's
    assert layer_shape(c_attn) == (48, 16)


def test_one_group_for_each_kind_of_layer():
    targets = find_targets(tiny.llama(), ["q_proj", "k_proj", "v_proj", "o_proj"])
    groups = group_layers(targets)
    assert [(g.name, g.n, g.d_out, g.d_in) for g in groups] == [
        ("q_proj", 2, 16, 16),
        ("k_proj", 2, 8, 16),
        ("v_proj", 2, 8, 16),
        ("o_proj", 2, 16, 16),
    ]
    for group in groups:
        assert all(targets[n] is m for n, m in zip(group.module_names, group.modules, strict=True))


def test_two_shapes_of_one_name():
    layers = {"a.q": nn.Linear(4, 4), "b.q": nn.Linear(6, 4), "c.q": nn.Linear(4, 4)}
    groups = group_layers(layers)
    assert [(g.name, g.module_names) for g in groups] == [
        ("q_4x4", ("a.q", "c.q")),
        ("q_4x6", ("b.q",)),
    ]


def test_layers_that_have_numbers_for_names():
    layers = {"0": nn.Linear(4, 3), "2": nn.Linear(3, 2), "5": nn.Linear(4, 3)}
    groups = group_layers(layers)
    assert [(g.name, g.module_names) for g in groups] == [
        ("layer_3x4", ("0", "5")),
        ("layer_2x3", ("2",)),
    ]
    assert group_layers({"0": nn.Linear(4, 3)})[0].name == "layer"


def test_groups_need_linear_layers():
    with pytest.raises(ConfigurationError, match="no layers"):
        group_layers({})
    with pytest.raises(ConfigurationError, match="norm is a LayerNorm"):
        group_layers({"norm": nn.LayerNorm(3)})


def test_rank_too_large_names_the_group_and_leaves_the_network_alone():
    net = tiny.llama()
    with pytest.raises(ConfigurationError, match=r"rank=9.*'v_proj'.*8 x 16.*at most 8"):
        BayesianLoRA(net, prior=KroneckerInducing(rank=9))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_is_adapted_once():
    net = tiny.llama()
    first = tiny.adapted(net, target_modules=["v_proj"])
    with pytest.raises(ConfigurationError, match=r"v_proj is adapted already.*unwrap"):
        tiny.adapted(net, target_modules=["q_proj", "v_proj"])
    # The refused one has left no hook on the layers before, so they can be adapted still
    first.unwrap()
    for module in net.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_what_was_put_into_the_network_since_stays_as_it_is():
    """The names of its parts may be others by then, and what came is not to be frozen or thawed."""
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
