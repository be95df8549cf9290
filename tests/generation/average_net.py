"""The judge: a network that is, by plain full passes, the average of networks with merged weights.

No adapter, hook or cache: each draw's dW is added to the weights of a copy of the network, each row
is run by itself, without its padding, and probabilities are averaged in double precision. Around it
is transformers' own ``generate``.
"""

import copy

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


def merged(blora, num_samples):
    """One plain copy of the network for each draw of the adapter, or for its mean."""
    updates = blora.posterior.pairs()(num_samples) if num_samples else blora.posterior.draws(0)
    nets = []
    for draw in range(max(1, num_samples)):
        with_weights = copy.deepcopy(blora.net)
        for module in with_weights.modules():
            module._forward_hooks.clear()
            vars(module).pop("forward", None)
        for group in blora.model.groups:
            layers = updates[group.name].layers()
            for name, layer in zip(group.module_names, layers, strict=True):
                weight = layer.weight().detach()
                weight = weight[draw] if weight.dim() == 3 else weight
                target = with_weights.get_submodule(name).weight.data
                target += weight if type(with_weights).__name__ != "GPT2LMHeadModel" else weight.mT
        nets.append(with_weights.double())
    return nets


class AverageNet(PreTrainedModel, GenerationMixin):
    """Its logits are ``log 1/S sum_s p_s``, at the mean level of the networks' own."""

    _supports_sdpa = True

    def __init__(self, nets):
        super().__init__(copy.deepcopy(nets[0].config))
        self.nets = torch.nn.ModuleList(nets)
        self.generation_config = GenerationConfig.from_model_config(self.config)
        self.seen = []

    def forward(self, input_ids, attention_mask=None, **options):
        rows = []
        for row, ids in enumerate(input_ids):
            real = ids if attention_mask is None else ids[attention_mask[row].bool()]
            each = [net(real[None], use_cache=False).logits[0, -1] for net in self.nets]
            rows.append(torch.stack(each))
        logits = torch.stack(rows, 1)  # S x R x V
        probs = logits.softmax(-1)
        level = (logits - logits.log_softmax(-1)).mean(-1).mean(0)
        self.seen.append(probs)
        return CausalLMOutput(logits=(probs.mean(0).log() + level[:, None])[:, None])

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **options):
        return {"input_ids": input_ids, "attention_mask": attention_mask}
