"""`atma serve`: a model behind OpenAI's API."""

import importlib.util
from typing import Annotated

import tyro

from atma.serve.http.options import ServerOptions

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "jinja2")


def require_packages() -> None:
    """ValueError with the mend where the server's packages are missing."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise ValueError("the server needs more packages: pip install 'atma-lm[serve]'")


def run(
    model: str = "nano",
    /,
    options: Annotated[ServerOptions, tyro.conf.OmitArgPrefixes] = ServerOptions(),  # noqa: B008
) -> None:
    """Serve a model over HTTP in the words of OpenAI's API, with a chat page at its address.

    Listens at 127.0.0.1 alone unless there is an API key. SIGTERM or Ctrl-C lets answers under way end; a second one
    ends at once. docs/server.md has every route, limit and metric.

    Args:
        model: A packaged model (see `atma info`), a model folder or a run folder.
        options: How it is served.
    """
    require_packages()
    from atma.serve.http.server import serve

    serve(model, options)
