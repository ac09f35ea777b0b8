"""Whether a recipe fits its data and the processes that train, found out before a run begins."""

from atma.config import Recipe
from atma.mixers.stretches import edges_of
from atma.strict import toml_value
from atma.train.parallel import Ranks
from atma.train.samples import check_samples
from atma.train.source import Source


def check_fit(recipe: Recipe, source: Source, ranks: Ranks) -> None:
    """ValueError says what does not fit, and the mend."""
    check_samples(recipe, source.tokenizer)
    if recipe.lora is not None and not recipe.train.init_from:
        raise ValueError("[lora] trains adapters of a model there is: name it with train.init_from, or --from FOLDER")
    if source.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"the data's tokenizer has {source.vocab_size} ids, 'model.vocab_size' is {recipe.model.vocab_size}: "
            f"set model.vocab_size={source.vocab_size}"
        )
    train = recipe.train
    for key, asked, made in (
        ("context_ranks", train.context_ranks, ranks.context),
        ("shard_ranks", train.shard_ranks, ranks.shard),
        ("offload", train.offload, ranks.offload),
    ):
        if asked != made:
            raise ValueError(f"'{key}' {toml_value(asked)}: processes share in `atma train` alone; leave it out here")
    further = [
        key
        for key, on in (("regulariser", train.regulariser != "none"), ("distractor_weight", train.distractor_weight))
        if on
    ]
    if train.context_ranks > 1 and further:
        raise ValueError(
            f"'{further[0]}' reads whole rows, which processes share ('context_ranks' {train.context_ranks}); "
            "leave one out"
        )
    if ranks.in_parts and train.distractor_weight:
        key = "shard_ranks" if train.shard_ranks > 1 else "offload"
        raise ValueError(
            f"'distractor_weight' reads weights outside their blocks, where they are in parts ('{key}' "
            f"{toml_value(getattr(train, key))}); leave one out"
        )
    if train.compile and train.context_ranks > 1:
        raise ValueError(
            f"'compile' true: blocks hand states to other processes ('context_ranks' {train.context_ranks}), which "
            "cannot be compiled; leave one out"
        )
    if train.compile and train.distractor_weight:
        raise ValueError("'distractor_weight' listens inside blocks, and 'compile' makes code of them; leave one out")
    try:
        edges_of(train.length, train.context_ranks, train.context_shares)
    except ValueError as error:
        raise ValueError(f"'context_shares': {error}") from None
    unit = train.length * train.accumulation * ranks.replicas
    if train.batch_tokens % unit:
        wanted = f"length × accumulation × processes{' / context_ranks' if train.context_ranks > 1 else ''} = {unit}"
        raise ValueError(f"'batch_tokens' must be a multiple of {wanted}, not {train.batch_tokens}")
