"""How a page opens: what is shown and why it matters, in three plain sentences."""

from collections.abc import Sequence

from atma.report.content import Recall


def opening(models: Sequence[str], trained_length: int, recall: Recall) -> list[str]:
    """Three sentences. `models` are the packaged ones, ours first."""
    ours, others = models[0], models[1:]
    beside = f", beside {' and '.join(others)}" if others else ""
    reach = max(recall.longest, trained_length)
    return [
        f"This page shows what small language models do with texts far longer than the {trained_length:,} tokens they "
        f"were trained at: {ours}, which has ATMA's layers{beside}.",
        f"It asks two things: is a fact that was told at the beginning found again up to {reach:,} tokens later, and "
        "do predictions get worse as the text before them grows?",
        "It matters because training on long texts is dear: a model that trains short and runs long gets long texts "
        "for the price of short ones.",
    ]
