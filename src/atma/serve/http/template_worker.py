"""Renders chat templates in a process of its own, so that no template can do harm or hold up the server.

A template comes with a model and may be anybody's. Jinja's immutable sandbox keeps it from objects; here it also has no
files to open, no environment, bounded memory, and a parent that ends the process when a rendering takes too long. This
file is run as a script and imports nothing of the package. Messages are JSON after a length of four bytes: first the
template, then one request after another.
"""

import datetime
import json
import resource
import sys
from typing import Any

MEMORY = 768 << 20


class Refused(Exception):
    """The template itself says no."""


def main() -> None:
    """Read a template, answer {} or {"error"}; then render requests until the input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    template: Any = None
    while (message := _receive(source)) is not None:
        try:
            if template is None:
                template, answer = _compiled(message["template"]), {}
            else:
                answer = {"text": template.render(**message)}
        except Exception as error:  # whatever a template does wrong is the answer
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        data = json.dumps(answer).encode()
        sink.write(len(data).to_bytes(4, "big") + data)
        sink.flush()


def _compiled(text: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    template = environment.from_string(text)
    _bound()
    return template


def _bound() -> None:
    """From here on: so much memory, no new files, nothing written to any, no core."""
    _now("%c")  # reads the time zone while it may
    for kind, most in (("AS", MEMORY), ("NOFILE", 3), ("FSIZE", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{kind}", None)
        if number is not None:
            try:
                resource.setrlimit(number, (most, most))
            except (ValueError, OSError):  # a system that does not know this bound; the time limit holds everywhere
                continue


def _receive(source: Any) -> Any:
    head = source.read(4)
    return json.loads(source.read(int.from_bytes(head, "big"))) if len(head) == 4 else None


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
    main()
