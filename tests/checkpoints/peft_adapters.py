"""Plain LoRAs by PEFT on tiny networks, away from their start, where they are nothing."""

import warnings

import peft
import tiny
import torch

BATCH = {key: tiny.sequences()[key] for key in ("input_ids", "attention_mask")}
LAYERS, CLASSES = ["q_proj", "v_proj"], {"task_type": "SEQ_CLS", "r": 2}
ONE = {r"layers\.1\.self_attn\.q_proj": 1}
# The base, and the options of PEFT: each scaling, Conv1D, a tied head, a trained head
CASES = {
    "llama": (tiny.llama, {"target_modules": LAYERS, "r": 3, "lora_alpha": 5, "rank_pattern": ONE}),
    "qwen2": (tiny.qwen2, {
        "target_modules": "all-linear", "r": 2, "use_rslora": True, "alpha_pattern": {"v_proj": 5},
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 1},
    }),
    "gpt2": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 2, "fan_in_fan_out": True}),
    "head": (lambda: tiny.llama(tied=True), {"target_modules": ["q_proj", "lm_head"], "r": 2}),
    "bert": (tiny.bert, {"target_modules": ["query", "value"], **CLASSES}),
    "distilbert": (tiny.distilbert, {"target_modules": ["q_lin"], **CLASSES}),
    "score": (tiny.llama_classifier, {"target_modules": ["v_proj"], **CLASSES}),
}  # fmt: skip


def trained(name="llama", **options):
    """A ``PeftModel`` whose trained tensors are off their start; the same base at every call."""
    config = peft.LoraConfig(**{**CASES[name][1], **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter")
        model = peft.get_peft_model(base(name), config).eval()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def base(name="llama"):
    """The network that ``trained(name)`` is around."""
    torch.manual_seed(0)
    return CASES[name][0]()


def logits(net):
    with torch.no_grad():
        return net(**BATCH).logits


def mean_logits(blora):
    with blora.posterior():
        return logits(blora.net)
