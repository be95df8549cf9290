"""What an adapter consists of, in lines to read."""

from pyro_blora.adapted import Adapted

__all__ = ["describe", "plain_lora_parameters"]


def plain_lora_parameters(blora: Adapted, rank: int) -> int:
    """How many numbers a plain LoRA of ``rank`` trains on the same layers, ``r (d_out + d_in)``."""
    return sum(g.n * rank * (g.d_out + g.d_in) for g in blora.model.groups)


def describe(blora: Adapted) -> str:
    """The three nouns, a line for each group of layers, and the number of trained parameters."""
    prior, guide = blora.prior_family[0], blora.guide_family[0]
    likelihood = blora.likelihood
    lines = [
        f"BayesianLoRA({type(blora.net).__name__})",
        f"  prior:      {prior!r}",
        f"  guide:      {getattr(guide, '__name__', repr(guide))}",
        f"  likelihood: {likelihood!r}",
    ]
    for group in blora.model.groups:
        count = sum(p.numel() for p in getattr(blora.model, group.name).parameters())
        lines.append(
            f"  {group.name}: {group.n} layers of {group.d_out} x {group.d_in}, "
            f"{count:,} parameters in the prior"
        )
    for name in blora.model.trained_heads.names:
        lines.append(f"  {name}: trained whole, as a point")
    frozen = sum(p.numel() for p in blora.net.parameters())
    trained = blora.trainable_parameters
    share = trained / (trained + frozen)
    lines.append(f"  trainable: {trained:,} beside {frozen:,} frozen ({share:.2%})")
    return "\n".join(lines)
