"""Classification by the next token among a few answer tokens."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.labels import Item, Template, has_places
from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods._prompts import PromptCollator, items_in
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
        data_names: the names of the classes in the training's data set, in order, which ``fit``
            keeps so that a data set of another order is refused.

    A batch has ``input_ids`` and ``attention_mask`` (``B x T``, padded on either side) and
    ``labels`` (``B``).

    Example::

        likelihood = LabelTokens(token_ids=[4191, 2730], num_data=len(train))
        likelihood.logits(net, batch).shape  # B x 2
    """

    def __init__(
        self,
        *,
        token_ids: Sequence[int],
        num_data: int | None = None,
        data_names: Sequence[str] = (),
    ) -> None:
        super().__init__(num_data=num_data)
        self.data_names = tuple(data_names)
        self.token_ids = token_ids = tuple(map(index, token_ids))
        if len(token_ids) < 2 or len(set(token_ids)) < len(token_ids) or min(token_ids) < 0:
            raise ConfigurationError(
                "token_ids must be at least two different tokens, one per class, got "
                f"{list(token_ids)}."
            )
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

    def _examine(self, rows: Any, collate: Collate | None, training: bool) -> None:
        """Refuses choices in another order than in training; the collator compares the rows."""
        super()._examine(rows, collate, training)
        if isinstance(collate, LabelTokensCollator) and not collate.letters and has_places(rows):
            for item in items_in([rows[0]])[0] if len(rows) else ():
                self.check_names(item.choices, training)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The logits of the answer tokens at the prompt's last token, ``(B, C)``."""
        inputs = self.inputs(batch)
        mask = inputs["attention_mask"]
        places = torch.arange(mask.shape[-1], device=mask.device)
        last = (places * mask.bool()).argmax(-1, keepdim=True)  # for padding on either side
        ids = self._answers.to(mask.device)
        return logits_at(net, inputs, last, token_ids=ids, narrow=self.fast)


class LabelTokensCollator(PromptCollator):
    """Makes a row from the prompt of every item; the answer is predicted at its last token.

    Takes the arguments of :class:`MultipleChoiceCollator`, with a template of ``scoring="labels"``.
    ``token_ids`` has the token of each label word, in the order of the classes. A batch has
    ``input_ids`` and ``attention_mask``, long, (B, T), padded on the right, and ``labels``, long,
    (B,).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int = 512
    ) -> None:
        super().__init__(tokenizer, template, max_length)
        words = {word: self._answer(word) for word in template.label_words}
        self.token_ids: tuple[int, ...] = tuple(ids[0] for ids in words.values() if len(ids) == 1)
        if len(set(self.token_ids)) < len(template.label_words):
            raise DataError(
                f"the label words have the tokens {words}, expected a different single one each: "
                "choose other label words, or scoring='options'"
            )
        self._choices: tuple[str, ...] | None = None  # those of the first item, and so of all

    def likelihood(self, num_data: int | None) -> LabelTokens:
        """The likelihood of its batches."""
        return LabelTokens(token_ids=self.token_ids, num_data=num_data)

    @property
    def letters(self) -> bool:
        """Whether the label words are letters, such as A and B, which stand for any choices."""
        return all(len(word.strip()) == 1 for word in self.template.label_words)

    def check_items(self, items: Sequence[Item]) -> tuple[str, ...] | None:
        """Checks that all items have the same choices, which it returns."""
        words = tuple(word.strip().casefold() for word in self.template.label_words)
        known, letters = self._choices, self.letters
        for item in items:
            choices = tuple(choice.strip().casefold() for choice in item.choices)
            classes = [words.index(c) if c in words else k for k, c in enumerate(choices)]
            known = known or choices
            if classes != list(range(len(words))) or not (letters or choices == known):
                raise DataError(
                    f"item {item.id!r} has {len(choices)} choices, {item.choices}, expected those "
                    f"of all items, one for each of the label words {self.template.label_words!r} "
                    "and in their order: reorder the choices and labels, or use another template"
                )
        return known

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        self._choices = self.check_items(items)
        input_ids, attention_mask = self._pad([self._prompt(item) for item in items])
        labels = torch.tensor([item.label for item in items])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
