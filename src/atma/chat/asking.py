"""A chat as token ids, rendered by its template: what a model is asked for the next turn.

with Renderer(template) as renderer:
    ids = chat_ids(renderer, tokenizer, [{"role": "user", "content": "Good morning"}])
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from atma.chat.renderer import Renderer
from atma.chat.template import BUILT_IN, PLAIN, Specials, Template, built_in, find_template
from atma.tokenizer import Tokenizer

Message = Mapping[str, str]


def chat_template(folder: Path, chosen: str | Path | None = None) -> Template:
    """The chosen template, a name of `BUILT_IN` or a file, or else the folder's own.

    ValueError: the folder has none, no such file, or jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise ValueError("chat templates need jinja2: pip install 'atma-lm[serve]'")
    if chosen is not None:
        if str(chosen) in BUILT_IN:
            return built_in(str(chosen))
        if not Path(chosen).is_file():
            raise ValueError(f"template {str(chosen)!r}: no such file; built in: {', '.join(BUILT_IN)}")
        return find_template(folder, Path(chosen))
    found = find_template(folder)
    if found.source == PLAIN:
        raise ValueError(
            f"{folder.name} has no chat template; put its chat_template.jinja into the model's folder, or choose "
            f"template='plain' (lines of \"User:\" and \"Assistant:\"), 'chatml' or a file. A model that was never "
            "taught to chat will not chat with any of them"
        )
    return found


def chat_ids(renderer: Renderer, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a chat with the beginning of an answer behind it; end-of-text first for the plain dialogue.

    What spells a special token inside a message is encoded as ordinary characters. ValueError: a message is no table of
    a role and a content, both text, or the template does not render it.
    """
    check(messages)
    specials = Specials(tokenizer, [text for message in messages for text in message.values()])
    hidden = [
        {name: text if name == "role" else specials.hidden(text) for name, text in message.items()}
        for message in messages
    ]
    ids = specials.tokens(renderer.render(hidden, prompted=True))
    return [tokenizer.eot, *ids] if renderer.template.after_end or not ids else ids


def check(messages: Sequence[Message]) -> None:
    """ValueError, with what a chat looks like, for anything else."""
    shape = 'messages must be a list such as [{"role": "user", "content": "Good morning"}]'
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"{shape}, not {messages!r}")
    for message in messages:
        texts = isinstance(message, Mapping) and all(isinstance(text, str) for text in message.values())
        if not texts or not {"role", "content"} <= set(message):
            raise ValueError(f"{shape}; this is none: {message!r}")
