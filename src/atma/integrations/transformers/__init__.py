"""Models of atma as models of Hugging Face's transformers: importing this makes them known to the Auto classes.

    import atma.integrations.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER)      # any model folder of atma
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

One class serves every mixer. `save_pretrained` writes a folder that atma reads. See docs/transformers.md.
"""

import transformers
from packaging.version import Version

OLDEST = "5.24"
"""The first transformers whose models take their cache as `cache`."""

if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(f"transformers {transformers.__version__} is too old: pip install 'transformers>={OLDEST}'")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from atma.hub_files import MODEL_TYPE  # noqa: E402
from atma.integrations.transformers.base_model import AtmaModel  # noqa: E402
from atma.integrations.transformers.cache import StateLayer  # noqa: E402
from atma.integrations.transformers.causal_lm import AtmaForCausalLM  # noqa: E402
from atma.integrations.transformers.configuration import AtmaConfig  # noqa: E402

__all__ = ["AtmaConfig", "AtmaForCausalLM", "AtmaModel", "StateLayer", "register"]


def register() -> None:
    """Make the classes known to transformers' Auto classes."""
    AutoConfig.register(MODEL_TYPE, AtmaConfig, exist_ok=True)
    AutoModel.register(AtmaConfig, AtmaModel, exist_ok=True)
    AutoModelForCausalLM.register(AtmaConfig, AtmaForCausalLM, exist_ok=True)


register()
