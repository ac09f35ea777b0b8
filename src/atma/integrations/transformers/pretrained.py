"""What `AtmaModel` and `AtmaForCausalLM` have in common: building, initialising, tying and saving."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from atma.config import ModelConfig
from atma.integrations.transformers.configuration import AtmaConfig
from atma.integrations.transformers.saving import write_beside
from atma.layers import init_linear
from atma.model import Model

_MARK = "_is_hf_initialized"
"""What transformers sets on what it has read or initialised."""


class AtmaPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` whose modules are those of `atma.model.Model`."""

    config: AtmaConfig
    config_class = AtmaConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed"
    _no_split_modules = ["Block"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_context_parallel = False

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which parameters are others by a second name, as they are built: a tied head, and what layers share."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {})

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Set every parameter that no checkpoint has set, as atma does, and the buffers that no checkpoint holds."""
        self._initialize_own()

    def _initialize_own(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} sets no weights")

    def _init_weights(self, module: nn.Module) -> None:
        """One new module, as an embedding or a head of another size is: transformers asks for it."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            init_linear(module, None, zero=True)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What `activation_checkpointing_enable` and `_disable` of transformers ask."""
        body: Any = self.base_model
        body.checkpoint(enable, gradient_checkpointing_func, every_n_layers)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained` of a folder that atma reads too. See `transformers.PreTrainedModel`."""
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not adapter:
            state_dict = kwargs.pop("state_dict", None)
            kwargs["state_dict"] = file_tensors(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, *args, **kwargs)
        if not adapter and kwargs.get("is_main_process", True):
            write_beside(Path(save_directory), self.config)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload; a model card that nobody has filled in is replaced by ours."""
        write_beside(Path(working_dir), self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class Building(TorchFunctionMode):
    """Inside, empty tensors are on `device`, and all others, which have values of their own, on the CPU.

    transformers builds a model on the device "meta" before it reads the weights; what a mixer computes when it is built
    (frozen projections, tables, orders of products) is in no file, or drawn from a generator of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return func(*args, **kwargs)


class _Unset(Model):
    """A model whose parameters are set by whoever built it."""

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """`Model.init_weights`, not yet."""


def built(config: ModelConfig) -> Model:
    """A model of a configuration, its parameters not set, and on the device "meta" inside of that context."""
    where = torch.get_default_device()
    with torch.device("cpu"), Building(where):
        return _Unset(config)


def shared_names(module: nn.Module) -> dict[str, str]:
    """Of each parameter with several names the later ones, and the first of it."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in named if first.setdefault(id(value), name) != name}


def fixed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that no checkpoint holds, by name."""
    held = set(module.state_dict())
    return {name: copy.deepcopy(value) for name, value in module.named_buffers() if name not in held}


def _given(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that transformers has set: it marks them, or the modules that own them."""
    owned = [(one, value) for one in module.modules() for value in (*one.parameters(False), *one.buffers(False))]
    return [value for one, value in owned if any(getattr(held, _MARK, False) for held in (one, value))]


def unset(module: nn.Module) -> bool:
    """Whether some parameter has been set by nobody."""
    given = {id(value) for value in _given(module)}
    return any(id(value) not in given for value in module.parameters())


def set_where_unset(module: nn.Module, initialise: Callable[[], object]) -> None:
    """Call `initialise`, which sets all parameters and buffers, and give those back that had been set before."""
    kept = [(value, value.detach().clone()) for value in _given(module)]
    initialise()
    for value, before in kept:
        value.copy_(before)
    for value in module.parameters():
        setattr(value, _MARK, True)


def file_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of atma's files, what has several names under its first."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, value in state_dict.items():
        lies = (value.device, value.data_ptr(), value.shape, value.stride())
        if value.device.type == "meta" or not value.numel() or lies not in seen:
            kept[name.removeprefix("model.")] = value
        seen.add(lies)
    return kept


__all__ = ["AtmaPreTrainedModel", "built", "file_tensors", "fixed_buffers", "set_where_unset", "shared_names", "unset"]
