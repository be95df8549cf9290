"""Classification by the next token among a few answer tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods.reading import check_causal, logits_at
from pyro_blora.network.targets import head_of


class LabelTokens(Likelihood):
    r"""A softmax over single answer tokens after the prompt.

    :math:`p(y = c \mid x) \propto \exp \ell_{a_c}(x)`, where :math:`\ell` are the logits at the
    prompt's last token and :math:`a_c` is the answer token of class :math:`c`, as in the papers of
    Laplace-LoRA (arXiv:2308.13111), BLoB (arXiv:2406.11675) and Bayesian-LoRA. The head runs at
    that position only.

    Args:
        token_ids: the answer tokens, one per class, in the order of the classes.
        num_data: number of training examples.

    A batch has ``input_ids`` and ``attention_mask`` (``B x T``, padded on either side) and
    ``labels`` (``B``).

    Example::

        likelihood = LabelTokens(token_ids=[4191, 2730], num_data=len(train))
        likelihood.logits(net, batch).shape  # B x 2
    """

    def __init__(self, *, token_ids: Sequence[int], num_data: int | None = None) -> None:
        super().__init__(num_data=num_data)
        if len(token_ids) < 2 or len(set(token_ids)) < len(token_ids) or min(token_ids) < 0:
            raise ConfigurationError(
                "token_ids must be at least two different tokens, one per class, got "
                f"{list(token_ids)}."
            )
        self.token_ids = tuple(token_ids)
        self.register_buffer("_answers", torch.tensor(self.token_ids), persistent=False)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError unless ``net`` is a causal language model with these tokens."""
        check_causal(net)
        size = getattr(head_of(net), "out_features", None)
        if size is not None and max(self.token_ids) >= size:
            raise ConfigurationError(
                f"token_ids must be below {size}, the size of the vocabulary, got "
                f"{list(self.token_ids)}; take them from the network's own tokenizer."
            )

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The logits of the answer tokens at the prompt's last token, ``(B, C)``."""
        inputs = self.inputs(batch)
        mask = inputs["attention_mask"]
        index = torch.arange(mask.shape[-1], device=mask.device)
        last = (index * mask.bool()).argmax(-1, keepdim=True)  # for padding on either side
        ids = self._answers.to(mask.device)
        return logits_at(net, inputs, last, token_ids=ids, narrow=self.shortcuts.on)
