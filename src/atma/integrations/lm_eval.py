"""Any of our models inside EleutherAI's lm-eval, as the model `atma`.

    python -m atma.integrations.lm_eval --model atma --model_args pretrained=nano --tasks arc_easy

is lm-eval's own command with that model known to it; in Python, importing this module does the same. Models of
transformers go through it too (pretrained=hf:NAME). `atma eval tasks` is the way to rows that `atma eval diff` reads.
"""

from atma.eval.eleuther import AtmaLM

__all__ = ["AtmaLM", "register"]


def register() -> None:
    """Make `atma` a model that lm-eval knows by name."""
    from lm_eval.api.registry import model_registry, register_model  # pyright: ignore[reportMissingImports]

    if "atma" not in model_registry:
        register_model("atma")(AtmaLM)


register()

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
