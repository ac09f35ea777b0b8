"""What lies in a model folder for Hugging Face's libraries beside what atma reads, so that one folder serves both.

config.json names the classes of `atma.integrations.transformers` and the tokens that begin, end and fill a text;
`modeling_atma.py` leads `trust_remote_code` to the installed package; `tokenizer_config.json` tells transformers what
`tokenizer.json` does not. All of it is written without transformers, and atma needs none of it back.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atma.tokenizer import Tokenizer

MODEL_TYPE = "atma"
SHIM = "modeling_atma.py"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"
"""How a chat is written as one text; words of whoever made the model."""
END_OF_TURN_NAMES = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end_of_turn|>")
SIDE_FILES = (SHIM, TOKENIZER_CONFIG, GENERATION_CONFIG, "special_tokens_map.json", "added_tokens.json")
"""What other programs write and owners may edit: no manifest vouches for them."""

CLASSES = {"AutoConfig": "AtmaConfig", "AutoModel": "AtmaModel", "AutoModelForCausalLM": "AtmaForCausalLM"}
SHIM_TEXT = '''"""Leads transformers to the classes of this model, which are in the package atma-lm."""

try:
    from atma.integrations.transformers import AtmaConfig, AtmaForCausalLM, AtmaModel
except ImportError as error:
    raise ImportError(f"this is a model of atma: pip install 'atma-lm[hf]' ({error})") from error

__all__ = ["AtmaConfig", "AtmaForCausalLM", "AtmaModel"]
'''


def class_keys() -> dict[str, Any]:
    """The keys of config.json by which transformers finds the classes."""
    auto = {name: f"{SHIM.removesuffix('.py')}.{cls}" for name, cls in CLASSES.items()}
    return {"model_type": MODEL_TYPE, "architectures": [CLASSES["AutoModelForCausalLM"]], "auto_map": auto}


def token_keys(tokenizer: "Tokenizer") -> dict[str, Any]:
    """The keys of config.json that name the tokens which begin, end and fill a text.

    What ends a text are end-of-text, first, and the special tokens that have the name of an end of turn.
    """
    turns = sorted(end_of_turn(tokenizer) - {tokenizer.eot})
    ends = [tokenizer.eot, *turns] if turns else tokenizer.eot
    return {"bos_token_id": tokenizer.start, "eos_token_id": ends, "pad_token_id": tokenizer.eot}


def end_of_turn(tokenizer: "Tokenizer") -> set[int]:
    """The ids of special tokens that have the name of an end of turn."""
    added = tokenizer.backend.get_added_tokens_decoder().items()
    return {i for i, token in added if token.special and token.content in END_OF_TURN_NAMES}


def tokenizer_settings(tokenizer: "Tokenizer") -> Mapping[str, Any]:
    """What tokenizer_config.json says: texts begin with the start token, as those that the model has read do."""
    start, end = (str(tokenizer.backend.id_to_token(i)) for i in (tokenizer.start, tokenizer.eot))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


__all__ = ["SIDE_FILES", "class_keys", "end_of_turn", "token_keys", "tokenizer_settings"]
