"""`AtmaForCausalLM`: any model of atma with its head, as transformers trains it and generates with it."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from atma.integrations.transformers.base_model import AtmaModel
from atma.integrations.transformers.configuration import AtmaConfig
from atma.integrations.transformers.core import Core
from atma.integrations.transformers.fused import with_own_logits
from atma.integrations.transformers.heads import AtmaHead
from atma.integrations.transformers.pretrained import AtmaPreTrainedModel, set_where_unset, unset


class AtmaForCausalLM(AtmaHead, AtmaPreTrainedModel, GenerationMixin):
    """A model with its head: tokens to logits, losses and further text."""

    def __init__(self, config: AtmaConfig) -> None:
        super().__init__(config)
        self.model = AtmaModel(config)
        self.head = nn.Linear(int(config.hidden_size or 0), int(config.vocab_size or 0), self.model.settings.head_bias)
        self._tied_weights_keys = {"head.weight": "model.embed.weight"}
        self.post_init()

    def core(self) -> Core:
        """The model's own code over the modules as they now are."""
        return self.model.core(self.head)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a head that TRL puts over `forward` becomes one with this model's own logits."""
        super().__setattr__(name, with_own_logits(value) if name == "forward" else value)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The head's weight is the embedding, where the configuration ties them."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {}) if self.config.tie_word_embeddings else {}

    def _initialize_own(self) -> None:
        self.model._initialize_own()
        if unset(self.head):
            set_where_unset(self.head, lambda: self._init_weights(self.head))

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`AtmaModel.forward`, and logits (B, T, V) of the next tokens, or those of `logits_to_keep` alone.

        labels (B, T) give the loss: nats a token that is not −100, divided by `num_items_in_batch` where it is given;
        as shift_labels they are those of the tokens after each.
        In training the loss is computed without logits, which are then None, unless skip_logits=False.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no name of its own: Trainer would ask every batch for it
        scored = labels is not None or shift_labels is not None
        if scored and use_cache is None and cache is None:
            use_cache = False
        if isinstance(logits_to_keep, int) and logits_to_keep:
            kwargs["kept"] = logits_to_keep
        out = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, return_dict=True, **kwargs
        )
        hidden, loss = out.last_hidden_state, None
        if scored:
            loss = self.mean_loss(hidden, labels, shift_labels, kwargs.get("num_items_in_batch"))
        skip = self.training and scored if skip_logits is None else skip_logits
        logits = None if skip else self.logits(slice_logits_to_keep(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=cast(Any, loss), logits=cast(Any, logits), cache=out.cache, hidden_states=out.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """A `DynamicCache` of our layers. ValueError for a kind of cache that a state cannot be."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r}: a state is of no other kind; leave it out")
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # pyright: ignore


__all__ = ["AtmaForCausalLM"]
