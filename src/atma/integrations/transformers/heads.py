"""What a head computes from hidden states: logits, the loss of labels, and what TRL asks of a head of its own."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.ops.loss import NOT_SCORED, softcap

if TYPE_CHECKING:
    from atma.integrations.transformers.core import Core


class AtmaHead:
    """Logits and losses of a model that has a `head` and a `core()`."""

    head: nn.Module

    def core(self) -> "Core":
        """The model's own code."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Another head."""
        self.head = new_embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, D) to capped logits (…, V), float32 or wider."""
        core = self.core()
        if isinstance(self.head, nn.Linear):
            return core.logits(hidden)
        raw = self.head(hidden).to(torch.promote_types(hidden.dtype, torch.float32))
        return softcap(raw, core.config.logit_cap)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats (B, T) of targets (B, T) under hidden (B, T, D); 0 where the target is −100."""
        if isinstance(self.head, nn.Linear):
            return self.core().loss(hidden, targets)
        return F.cross_entropy(self.logits(hidden).movedim(-1, 1), targets, ignore_index=NOT_SCORED, reduction="none")

    def mean_loss(self, hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None, items: Any) -> Tensor:
        """The loss of labels, of the token after each, or of shift_labels, of each; a sum divided by `items`."""
        if shift_labels is None:
            assert labels is not None
            shift_labels, hidden = labels[:, 1:], hidden[:, :-1]
        targets = shift_labels.to(hidden.device)
        if not targets.numel():
            return hidden.sum() * 0.0
        total = self.losses(hidden, targets.contiguous()).sum()
        if items is None:
            return total / (targets != NOT_SCORED).sum().clamp(min=1)
        return total / torch.as_tensor(items, device=total.device)


__all__ = ["AtmaHead"]
