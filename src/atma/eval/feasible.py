"""What an evaluation can never do, told before anything is trained: the plan of `evaluate`, made without a model."""

from typing import cast

from atma.config import EvaluationConfig, Recipe
from atma.data.dataset import TokenSet
from atma.eval.curves import check_targets
from atma.eval.documents import text_tokens
from atma.eval.language_model import LanguageModel
from atma.eval.needle import check_room
from atma.eval.plan import plan
from atma.eval.suite import Untrained
from atma.tokenizer import Tokenizer


def check_evaluation(evaluation: EvaluationConfig, token_set: TokenSet) -> list[str]:
    """What an evaluation of this validation split lacks, in lines. ValueError, with the mend, where it cannot work."""
    if token_set.tokenizer is None:
        raise ValueError("[evaluation] needs a tokenizer, and the data has none; make the data with `atma prepare`")
    try:
        plan(cast(LanguageModel, Untrained(token_set.tokenizer)), token_set, evaluation, True)
    except ValueError as error:
        raise ValueError(f"[evaluation] cannot work: {error}") from None
    room = text_tokens(token_set)
    short = [f"{length:,}" for length in evaluation.lengths if length > room]
    return [f"[evaluation]: too little text ({room:,} tokens) for losses at {', '.join(short)} tokens"] if short else []


def check_without_data(evaluation: EvaluationConfig, tokenizer: Tokenizer | None) -> None:
    """What can be said before there are data. ValueError, with the mend, where the evaluation cannot work."""
    try:
        check_targets(evaluation.lengths, evaluation.target_tokens)
        if tokenizer is not None:
            check_room(tokenizer, evaluation)
    except ValueError as error:
        raise ValueError(f"[evaluation] cannot work: {error}") from None


def check_recipe(recipe: Recipe, evaluates: bool = False) -> list[str]:
    """`check_evaluation` of a recipe that says something under [evaluation], or is to be evaluated."""
    if not evaluates and recipe.evaluation == EvaluationConfig():
        return []
    return check_evaluation(recipe.evaluation, TokenSet.open(recipe.data.path, "validation"))
