"""Renders chat templates in a process of its own, so that no template can do harm or hold up the server.

A template comes with a model and may be anybody's. Jinja's immutable sandbox keeps it from objects; here it also has no
files to open, no environment, bounded memory, and a parent that ends the process when it takes too long. This file is
run as a script and imports nothing of the package. Messages are JSON after a length of four bytes: {} when it is ready,
then answers to the template, with the one for tools if that is separate, and to one request after another.
"""

import datetime
import json
import resource
import sys
from typing import Any

MEMORY = 512 << 20

WARM = """{% set n = namespace(a='\\n') %}{% for i in [1, 2.5] %}{{ '%s' % i ~ i | round | string | indent }}
{% endfor %}{{ 'ä' | urlencode }}{{ n | pprint }}{{ strftime_now('%c') }}{{ 'a b' | wordwrap(1) }}
{{ {'a': 1} | tojson | safe }}"""


class Refused(Exception):
    """The template itself says no."""


def main() -> None:
    """Read a template, answer {} or {"error"}; then render requests until the input ends."""
    environment, templates = _environment(), []
    _warm(environment)
    _bound()
    _send({})
    while (message := _receive()) is not None:
        try:
            if not templates:
                texts = [message["template"], *filter(None, [message.get("tool_use")])]
                templates, answer = [environment.from_string(text) for text in texts], {}
            else:
                answer = {"text": templates[-1 if message.get("tools") else 0].render(**message)}
        except Exception as error:  # whatever a template does wrong is the answer
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        _send(answer)


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what training learns from. Rendered, it is what it holds, between
        the signs `generation_begin` and `generation_end` where a request has them."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            held = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.Name(f"generation_{side}", "load")]) for side in ("begin", "end"))
            return nodes.Scope([begin, *held, end], lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _warm(environment: Any) -> None:
    """Import whatever Python and jinja2 import only when it is needed: soon no file can be opened any more."""
    import pprint
    import textwrap

    import jinja2.debug

    assert pprint and textwrap and jinja2.debug
    environment.from_string(WARM).render()
    for text in ("{{ 1 / 0 }}", "{{ ", "{{ raise_exception('') }}"):
        try:
            environment.from_string(text).render()
        except Exception as error:
            str(error)


def _bound() -> None:
    """From here on: so much memory, no new files, nothing written to any, no core."""
    for kind, most in (("AS", MEMORY), ("NOFILE", 3), ("FSIZE", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{kind}", None)
        if number is not None:
            try:
                resource.setrlimit(number, (most, most))
            except (ValueError, OSError):  # a system that does not know this bound; the time limit holds everywhere
                continue


def _receive() -> Any:
    head = sys.stdin.buffer.read(4)
    return json.loads(sys.stdin.buffer.read(int.from_bytes(head, "big"))) if len(head) == 4 else None


def _send(answer: dict[str, str]) -> None:
    data = json.dumps(answer).encode()
    sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)
    sys.stdout.buffer.flush()


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
    main()
