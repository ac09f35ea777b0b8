"""Plans of selection policies: measured on texts of a model that reads all of its keys, and written as JSON.

Such a policy says in its own module what is measured; here the model reads, and its attention layers are looked at. The
work grows with the square of a text's length, and so does the memory: some thousand tokens are enough.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atma.hashes import model_hash
from atma.mixers.observing import layers_of
from atma.mixers.table import POLICIES, find
from atma.model import Model
from atma.selection import mixers_of


@torch.inference_mode()
def plan(model: Model, policy: str, texts: Sequence[Tensor]) -> dict[str, Any]:
    """The plan of a policy that needs one, for this model, by texts of tokens (T,) int64: what `plan=FILE` is to hold.

    ValueError: the policy needs none, the model is read through a policy already, or there is no text.
    """
    cls = find(policy, "policy").cls
    if not hasattr(cls, "planned"):
        needing = [name for name in POLICIES if hasattr(find(name, "policy").cls, "planned")]
        raise ValueError(f"policy '{policy}' needs no plan; these do: {', '.join(needing)}")
    if model.selection is not None:
        raise ValueError(f"a plan is made of a model that reads everything, and '{model.selection}' is set")
    if not texts or any(text.ndim != 1 or not len(text) for text in texts):
        raise ValueError("a plan wants at least one text of tokens (T,), none of them empty")
    seats = [mixer for mixer in mixers_of(model) if mixer.selects]
    if not seats:
        raise ValueError(f"policy '{policy}': no layer of this model holds the keys of a whole text")
    return cls.planned([layers_of(seats, _reading(model, text)) for text in texts], model_hash(model))


def _reading(model: Model, text: Tensor) -> Callable[[], object]:
    return lambda: model(text[None].to(model.embed.weight.device))
