"""The server's log on stderr, a line a request, as text or as JSON; never anything of a request's text."""

import contextlib
import json
import logging
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Literal

LOG = logging.getLogger("atma.serve")
Form = Literal["text", "json", "off"]


class JsonLines(logging.Formatter):
    """One object a line: of a request its `call` (`Call.fields`), of anything else its level, message and error."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")}
        call = getattr(record, "call", None)
        if call is not None:
            return json.dumps(told | call)
        told |= {"level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


@contextlib.contextmanager
def logs(form: Form) -> Generator[None, None, None]:
    """Whatever the server says is on stderr, and nothing of uvicorn's own. "off" leaves out the lines of requests,
    which is the `Guard`'s work; faults are told all the same."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
