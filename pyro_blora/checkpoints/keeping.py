"""How an adapter is written, exported and read again: what ``BayesianLoRA`` inherits."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro.nn import PyroModule
from torch import nn
from typing_extensions import Self

from pyro_blora.checkpoints.card import Result
from pyro_blora.checkpoints.hub import pushed
from pyro_blora.checkpoints.saved import read_pretrained, save_pretrained
from pyro_blora.errors import CheckpointError, first_line
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import GuideFactory

__all__ = ["Keeping"]


class Keeping(PyroModule):
    """The part of ``BayesianLoRA`` that folders and files are about."""

    model: BayesianLoRAModel
    guide: Any

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        result: Result | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> None:
        """Writes the adapter; see :func:`pyro_blora.checkpoints.save_pretrained`."""
        about: dict[str, Any] = {"result": result, "notes": notes}
        save_pretrained(self, self.model, self.guide_family, folder, **about)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "A Bayesian LoRA adapter",
        result: Result | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> str:
        """Writes the adapter to the hub, as :meth:`save_pretrained` does to a folder.

        Args:
            repo_id: the repository, ``"user/name"``; made if it is missing.
            private: whether a new repository is private. Default: the account's setting.
            commit_message: of the commit.
            result: what ``fit`` returned, for the model card.
            notes: more lines of the model card, by their names.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the hub refuses or cannot be reached.
        """
        about: dict[str, Any] = {"result": result, "notes": notes, "place": repo_id}
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(self, self.model, self.guide_family, folder, **about)
            return pushed(Path(folder), repo_id, private=private, message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        net: nn.Module | str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        prior: UpdateModel | type[UpdateModel] | Mapping[str, UpdateModel] | None = None,
        guide: SiteGuide | type[SiteGuide] | Mapping[str, SiteGuide] | GuideFactory | None = None,
        likelihood: Likelihood | type[Likelihood] | None = None,
        trust_remote_code: bool = False,
        fast: bool = True,
    ) -> Self:
        """An adapter from its folder or its hub id, on its base.

        ``from_pretrained(net, folder)`` puts it on a network at hand, ``from_pretrained(folder)``
        loads the base by its saved name, in the dtype in which it was. ``fast`` is the
        constructor's; for all else see :func:`pyro_blora.checkpoints.read_pretrained`.

        Raises:
            CheckpointError: the folder is no adapter's, is spoiled, or is one for another base.

        Example::

            blora = BayesianLoRA.from_pretrained("me/my-adapter")
            blora.predict(batch, num_samples=10).probs  # B x K
        """
        if folder is None and not isinstance(net, nn.Module):
            net, folder = None, net
        if not isinstance(folder, str | os.PathLike) or not isinstance(net, nn.Module | None):
            raise CheckpointError(
                "from_pretrained takes a folder or a hub id, or a network and one of these: "
                f"from_pretrained('out') or from_pretrained(net, 'out'), not {net!r:.60} and "
                f"{folder!r:.60}."
            )
        parts: dict[str, Any] = {"prior": prior, "guide": guide, "likelihood": likelihood}
        saved = read_pretrained(net, folder, **parts, trust_remote_code=trust_remote_code)
        try:
            blora: Self = cls(saved.net, **saved.options, fast=fast)
        except Exception as error:  # what a spoiled option leads to may raise anything
            raise CheckpointError(
                f"{folder} cannot be put on {type(saved.net).__name__}: {first_line(error)}"
            ) from error
        try:
            saved.load_into(blora)
        except CheckpointError:
            blora.unwrap()
            raise
        return blora
