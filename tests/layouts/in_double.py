"""Models of transformers in float64 throughout.

Their norms, softmaxes and rotary angles are float32 whatever the model is, so that a model in float64 is exact to 1e-7
alone. Here `float`, and the type float32 where it is asked for, mean float64.
"""

from unittest import mock

import torch
from torch import Tensor


def doubled(model, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of a copy of the model whose every operation is float64."""
    to, number = Tensor.to, Tensor.float

    def wide(self: Tensor, *args, **named):
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        if named.get("dtype") is torch.float32:
            named["dtype"] = torch.float64
        return to(self, *args, **named)

    softmax = torch.nn.functional.softmax

    def wide_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=torch.float64)

    model = model.double()
    with (
        mock.patch.object(Tensor, "to", wide),
        mock.patch.object(
            Tensor, "float", lambda self: number(self) if not self.is_floating_point() else self.double()
        ),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        return model(tokens).logits
