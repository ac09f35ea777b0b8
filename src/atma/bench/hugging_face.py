"""Hugging Face's LFM2 and Qwen3-Next as contenders: random weights, our width, depth, heads and layer pattern.

Layers that do not attend become LFM2's gated convolutions and Qwen3-Next's gated delta nets; no experts. The MLP's
intermediate size is chosen so that the parameters come as near as possible to ours. Attention is PyTorch's SDPA.
"""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.bench.available import peer
from atma.bench.models import batch_of, weight_bytes
from atma.config import ModelConfig
from atma.eval.transformers_cache import cache_argument, cache_of
from atma.mixers.heads import Attending

FIRST = 8
"""Tokens that a peer reads to make its cache; the keys and values of the whole context then take their place."""
STEP = 8
"""Intermediate sizes are multiples of it."""
GLOBAL = "full_attention"
OTHERWISE = "in another form; take transformers 5.17 or newer"


class Peer:
    """One of their models. Training keeps float32 weights; else they are in `dtype`."""

    ours = False

    def __init__(self, name: str, kind: type, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.kind, self.config, self.dtype, self.device = name, kind, config, dtype, device

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.kind(copy.deepcopy(self.config)).to(self.device)

    def parameters(self) -> int:
        return _count(self.kind, self.config)

    def trainer(self, rows: int, length: int) -> Callable[[], object]:
        """Forward, backward, clipping and a step of AdamW."""
        model = self.model().train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        batch = batch_of(self.config.vocab_size, rows, length, self.device)
        low = self.dtype != torch.float32

        def step() -> float:
            with torch.autocast(self.device.type, self.dtype if low else torch.bfloat16, enabled=low):
                logits = model(input_ids=batch.tokens, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            return loss.item()

        return step

    def decoder(self, rows: int, context: int) -> tuple[Callable[[], object], int]:
        """One more token at `context`, from a cache that is put back before each; and the bytes that a token reads."""
        model = self.model().to(self.dtype).eval()
        with torch.inference_mode():
            cache = self._filled(model, rows, context)
            held = [(layer, layer.keys, layer.values) for layer in _key_layers(cache)]
        token = torch.zeros(rows, 1, dtype=torch.long, device=self.device)

        @torch.inference_mode()
        def step() -> Tensor:
            for layer, keys, values in held:
                layer.keys, layer.values = keys, values
            return _go_on(model, token, cache).argmax(-1)

        read = weight_bytes(model, model.get_input_embeddings(), self.config.tie_word_embeddings)
        return step, read + _cache_bytes(cache)

    def prefill(self, rows: int, length: int) -> tuple[Callable[[], object], int]:
        """The next token's scores after a prompt, in one pass that fills a cache; and the bytes of the weights."""
        model = self.model().to(self.dtype).eval()
        tokens = batch_of(self.config.vocab_size, rows, length, self.device).tokens

        @torch.inference_mode()
        def read() -> Tensor:
            return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

        weights = weight_bytes(model, model.get_input_embeddings(), self.config.tie_word_embeddings)
        return read, weights

    def tiny(self) -> "Peer":
        """The same layers with next to no arithmetic in them."""
        sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 16}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
        linear = {f"linear_num_{name}_heads": 1 for name in ("key", "value")}
        linear |= {f"linear_{name}_head_dim": 16 for name in ("key", "value")}
        config = copy.deepcopy(self.config)
        for name, value in (sizes | heads | linear).items():
            if hasattr(config, name):
                setattr(config, name, value)
        return Peer(self.name, self.kind, config, self.dtype, self.device)

    def check(self, kind: str) -> None:
        """ValueError unless it scores in float32 as in float64, and after a cache as without one."""
        model = self.tiny().model().float().eval()
        tokens = batch_of(model.config.vocab_size, 1, 2 * FIRST, self.device).tokens
        with torch.inference_mode():
            found = model(input_ids=tokens).logits[:, -1]
            if kind != "train":
                cache = cache_of(model(input_ids=tokens[:, :-1], use_cache=True))
                found = _go_on(model, tokens[:, -1:], cache)[:, -1]
            exact = model.double()(input_ids=tokens).logits[:, -1]
        if not (gap := (found - exact).abs().max().item()) <= 1e-3:
            raise ValueError(f"no figures: {kind} of {self.name} is {gap:.1e} off its own float64 form")

    def _filled(self, model: Any, rows: int, context: int) -> Any:
        tokens = torch.zeros(rows, FIRST, dtype=torch.long, device=self.device)
        cache = cache_of(model(input_ids=tokens, use_cache=True))
        for layer in _key_layers(cache):
            for field in ("keys", "values"):
                x = getattr(layer, field)
                setattr(layer, field, 0.5 * x.new_empty(*x.shape[:2], context, x.shape[3]).normal_())
        return cache


class Layers(NamedTuple):
    """What a peer is made after: which layers attend, the heads of the first that does, and the taps of the others."""

    attending: list[bool]
    heads: int
    groups: int
    head_width: int
    taps: int


def layers_of(config: ModelConfig) -> Layers | None:
    """Of a model of ours; None where no layer attends. Taps are as far as the first of the others reaches, else 3."""
    with torch.device("meta"):
        mixers = [config.mixer(layer) for layer in range(config.depth)]
    heads = next((one for one in mixers if isinstance(one, Attending)), None)
    if heads is None:
        return None
    reaches = (one.reach for one in mixers if not isinstance(one, Attending))
    taps = next((reach + 1 for reach in reaches if reach is not None), 3)
    attending = [isinstance(one, Attending) for one in mixers]
    return Layers(attending, heads.heads, heads.groups, heads.head_width, taps)


def peers(config: ModelConfig, dtype: torch.dtype, device: torch.device, notes: list[str]) -> list[Peer]:
    """Their models nearest to ours; none without transformers, and a note."""
    module, layers = peer("transformers", notes), layers_of(config)
    if module is not None and layers is None:
        notes.append("no layer of the model attends: LFM2 and Qwen3-Next, which do, are left out")
    if module is None or layers is None:
        return []
    made = []
    for name, kind, describe in (("LFM2", "Lfm2", _lfm2), ("Qwen3-Next", "Qwen3Next", _qwen)):
        classes = _classes(module, kind)
        if classes is None:
            notes.append(f"this version of transformers has no {name}: left out")
            continue
        chosen = nearest(config, lambda size, c=classes, d=describe: d(c[0], config, layers, size), classes[1])
        made.append(Peer(name, classes[1], chosen, dtype, device))
    return made


def nearest(config: ModelConfig, described: Callable[[int], Any], kind: type) -> Any:
    """The described configuration with the intermediate size that brings its parameters nearest to ours."""
    from atma.bench.models import Ours

    wanted = Ours(config, "auto", torch.float32, torch.device("cpu")).parameters()
    first, second = (_count(kind, described(size)) for size in (STEP, 2 * STEP))
    size = STEP * max(1, 1 + round((wanted - first) / (second - first)))
    return described(size)


def _lfm2(config_class: type, config: ModelConfig, layers: Layers, size: int) -> Any:
    return config_class(
        **_shared(config, layers, size, "conv"),
        conv_L_cache=layers.taps,
        block_auto_adjust_ff_dim=False,
    )


def _qwen(config_class: type, config: ModelConfig, layers: Layers, size: int) -> Any:
    return config_class(
        **_shared(config, layers, size, "linear_attention"),
        head_dim=layers.head_width,
        linear_key_head_dim=layers.head_width,
        linear_value_head_dim=layers.head_width,
        linear_num_key_heads=layers.heads,
        linear_num_value_heads=layers.heads,
        num_experts=0,
        mlp_only_layers=list(range(config.depth)),
    )


def _shared(config: ModelConfig, layers: Layers, size: int, otherwise: str) -> dict[str, Any]:
    """What both take; `otherwise`: the kind of a layer that does not attend."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": layers.heads,
        "num_key_value_heads": layers.groups,
        "layer_types": [GLOBAL if attends else otherwise for attends in layers.attending],
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": config.tied_head,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }


def _classes(module: ModuleType, kind: str) -> tuple[type, type] | None:
    found = [getattr(module, f"{kind}{part}", None) for part in ("Config", "ForCausalLM")]
    return None if None in found else (found[0], found[1])  # pyright: ignore[reportReturnType]


def _go_on(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Scores of the next tokens, read on from a cache. ValueError if this version takes no cache by a name we know."""
    name = cache_argument(model)
    if name is None:
        raise ValueError(
            "this version of transformers takes its cache in another form; take transformers 5.17 or newer"
        )
    return model(input_ids=tokens, use_cache=True, **{name: cache}).logits


def _count(kind: type, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())


def _key_layers(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys. ValueError if this version of transformers holds them otherwise."""
    layers = [layer for layer in getattr(cache, "layers", []) if isinstance(getattr(layer, "keys", None), Tensor)]
    if not layers:
        raise ValueError(
            "this version of transformers keeps its cache in another form; take transformers 5.17 or newer"
        )
    return layers


def _cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that the layers of a cache hold."""
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            total += sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))
    return total
