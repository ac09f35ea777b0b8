"""`atma batch`: a file of requests in the form of OpenAI's batches, answered without a server."""

from pathlib import Path
from typing import Annotated

import tyro

from atma.commands.serve import require_packages
from atma.serve.http.batch_options import BatchOptions


def run(
    requests: Path,
    answers: Path,
    /,
    model: str = "nano",
    options: Annotated[BatchOptions, tyro.conf.OmitArgPrefixes] = BatchOptions(),  # noqa: B008
) -> None:
    """Answer a file of requests in the form of OpenAI's batches, through the routes of `atma serve`, without a server.

    Of each line's custom_id there is one line of answers, in no order. Run again after Ctrl-C, it goes on where it was.

    Args:
        requests: A jsonl file; each line has custom_id, method (POST), url (such as /v1/chat/completions) and body.
        answers: The file that answers are appended to.
        model: A packaged model (see `atma info`), a model folder or a run folder.
        options: How they are answered.
    """
    require_packages()
    from atma.serve.http.batch import answer_batch

    print(answer_batch(model, requests, answers, options).counts)
