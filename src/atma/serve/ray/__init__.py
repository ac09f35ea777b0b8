"""The server as replicas of a Ray Serve application: START HERE.

    serve run atma.serve.ray:build model=nano replicas=2 memory_budget=1GiB

Every replica is the whole server of `atma.serve.http` with an engine of its own. Kept states are the replica's, so the
turns of a conversation belong on one: `forward.py` sees to that. `replica.py` is a replica's life. Needs
`pip install 'atma-lm[ray]'`; nothing else of atma imports ray.
"""
# pyright: reportMissingImports=false

import dataclasses
import difflib
import importlib.util
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atma.loading import base_folder, is_adapters, packaged
from atma.serve.http.options import ServerOptions

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build", "deployment"]

OWN = {"model": str, "replicas": int, "cpus": float, "affinity": bool}
STICKY: dict[str, Any] = {
    "request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
    "request_router_kwargs": {"num_fallback_replicas": 0},
}
"""A home that is slow to answer stays the home: there the state is kept. One that dies leaves the ring."""
FORWARDED_AT_ONCE = 128
"""Requests that a replica may be passing on to others; beyond, it answers itself."""
GRACE_SECONDS = 5.0
"""For a replica to write its kept states once the last answer has ended."""


def build(args: dict[str, Any]) -> "Application":
    """For `serve run atma.serve.ray:build key=value …` and for `args` of a Serve configuration file.

    Keys are `deployment`'s and the fields of `ServerOptions`, as text or as themselves. ValueError names what is wrong.
    """
    hints = OWN | typing.get_type_hints(ServerOptions)
    values = {key: _value(hints, key, value) for key, value in args.items()}
    own = {key: values.pop(key) for key in OWN if key in values}
    return deployment(options=ServerOptions(**values), **own)


def deployment(
    model: str = "nano",
    *,
    replicas: int = 1,
    cpus: float = 1.0,
    affinity: bool = True,
    options: ServerOptions = ServerOptions(),  # noqa: B008
) -> "Application":
    """A bound deployment for `ray.serve.run`, at the route prefix "/".

    Args:
        model: A packaged model, or a model or run folder that every node has at the same place.
        replicas: Engines, each with a model and a memory budget of its own.
        cpus: What Ray sets aside for a replica; also its processor threads unless `options.threads` says otherwise.
        affinity: Whether a conversation's turns go to one replica.
        options: Of every replica. Without an API key only clients on the proxy's own machine are answered.

    ValueError: ray is missing, there is no such model, or an option makes no sense here.
    """
    _require(replicas, cpus, options)
    place = _place(model)
    from ray import serve  # pyright: ignore[reportAttributeAccessIssue] (where ray is not there)
    from ray.serve.config import RequestRouterConfig

    from atma.serve.ray.replica import Replica

    threads = options.threads or max(1, int(cpus))
    options = dataclasses.replace(options, api_key=options.key(), threads=threads)
    forwarded = None if replicas == 1 else FORWARDED_AT_ONCE if affinity else 0
    return serve.deployment(
        serve.ingress()(Replica),
        name="atma",
        num_replicas=replicas,
        max_ongoing_requests=options.max_rows + options.max_waiting + FORWARDED_AT_ONCE,
        ray_actor_options={"num_cpus": cpus},
        graceful_shutdown_timeout_s=options.drain_seconds + GRACE_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(**STICKY) if forwarded else RequestRouterConfig(),
    ).bind(place, options, forwarded)


def _require(replicas: int, cpus: float, options: ServerOptions) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ValueError("replicas need more packages: pip install 'atma-lm[ray]'")
    if replicas < 1:
        raise ValueError(f"'replicas' must be at least 1, not {replicas}")
    if not cpus > 0:
        raise ValueError(f"'cpus' must be more than 0, not {cpus}")
    plain = ServerOptions()
    for name in ("host", "port"):
        if getattr(options, name) != getattr(plain, name):
            value = getattr(options, name)
            raise ValueError(f"'{name}' {value!r}: Ray's proxies listen, not atma; set http_options of Serve")


def _place(model: str) -> str:
    """The model as every replica finds it, wherever it starts. ValueError: there is none."""
    folder = base_folder(model)
    if model in packaged():
        return model
    return str((Path(model) if is_adapters(Path(model)) else folder).resolve())


def _value(hints: dict[str, Any], key: str, value: Any) -> Any:
    """An argument in its type: the command line has text only, of several values parted by commas."""
    from pydantic import TypeAdapter, ValidationError

    if key not in hints:
        near = difflib.get_close_matches(key, hints, 1, 0.0)[0]
        raise ValueError(f"unknown key '{key}'; did you mean '{near}'?")
    if typing.get_origin(hints[key]) is tuple and isinstance(value, str):
        value = value.split(",")
    try:
        return TypeAdapter(hints[key]).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"'{key}': {error.errors()[0]['msg']}, not {value!r}") from None
