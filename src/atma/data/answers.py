"""Conversations as tokens through a model's chat template, and which of them are answers.

Where the template marks what is to be learned ({% generation %}), that is taken. Else an answer is what the text of the
conversation up to it has more than the text up to its question with the beginning of an answer behind it: exactly what
the server asks the model for. Where a template writes earlier turns otherwise than the last one, so that these texts do
not begin alike, the answers are found by signs around them, or around what is behind their reasoning, if the template
writes the same with the signs as without. An answer ends with its end-of-turn token, where one follows. Nothing is
guessed: where none of the ways holds, it is an error.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np

from atma.chat.renderer import Renderer
from atma.chat.template import Specials
from atma.data.conversations import Message
from atma.data.encoders import Told
from atma.hub_files import end_of_turn
from atma.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%-?\s*generation\b")
THOUGHT = "</think>"
"""Ends the reasoning of an answer, which templates like to leave out of earlier turns."""
MARK_THEM = "; mark them in it with {% generation %} … {% endgeneration %}"
Span = tuple[int, int]
"""First character of an answer and the one behind its end."""


class Answers:
    """Tokenises conversations through one template. Use it with `with`: it holds the renderer's process."""

    def __init__(self, renderer: Renderer, tokenizer: Tokenizer, most: int, ends: Collection[int] = ()) -> None:
        """most: the ids that the model has. ends: those that end a turn, beside end-of-text and what has the name of an
        end of turn."""
        self.renderer, self.tokenizer, self.most = renderer, tokenizer, most
        self.marked = bool(GENERATION.search(renderer.template.text))
        self._ends = {tokenizer.eot, *end_of_turn(tokenizer), *ends}
        self._ordinary = {tokenizer.eot, *_special(tokenizer)}

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.renderer.close()

    def __call__(self, messages: Sequence[Message]) -> Told:
        """ValueError: the template does not render it, its answers cannot be told, or a token is beyond the model."""
        contents = [message["content"] for message in messages]
        specials = Specials(self.tokenizer, contents)
        shown = [{"role": one["role"], "content": specials.hidden(one["content"])} for one in messages]
        text = self.renderer.render(shown, prompted=False)
        spans = [
            (first, self._stopped(text, specials.turn_end(text, first, last, self._ends)))
            for first, last in _learned(messages, self.spans(shown, text))
        ]
        ids, places = specials.placed(text)
        starts, answers = np.array(places, np.int64), np.zeros(len(ids), bool)
        for first, last in spans:
            answers |= (starts >= first) & (starts < last)
        return self._whole(np.array(ids, np.int64), answers)

    def spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Where the answers stand in the rendered text, in order. ValueError: it cannot be told."""
        marks = _unused("".join([text, *(message["content"] for message in messages)]))
        if self.marked:
            return _between(self.renderer.render(messages, False, marks), text, marks)
        found = self._by_prefixes(messages, text)
        return self._by_marks(messages, text, marks) if found is None else found

    def _by_prefixes(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """None where an earlier text is not the beginning of a later one."""
        found = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                asked = self.renderer.render(messages[:place], True)
                answered = self.renderer.render(messages[: place + 1], False)
            except ValueError:
                return None
            if not (answered.startswith(asked) and text.startswith(answered) and len(answered) > len(asked)):
                return None
            found.append((len(asked), len(answered)))
        return found

    def _by_marks(self, messages: Sequence[Message], text: str, marks: tuple[str, str]) -> list[Span]:
        """With the signs around all that an answer says; if templates take that apart, around what is behind its
        reasoning, and the answer is what the text has behind its question all the same where it begins alike."""
        try:
            return self._signed(messages, text, marks, "")
        except ValueError:
            if not any(THOUGHT in message["content"] for message in messages if message["role"] == "assistant"):
                raise
        found = self._signed(messages, text, marks, THOUGHT)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return [
            (self._asked(messages[:place], text, span[0]), span[1]) for place, span in zip(places, found, strict=True)
        ]

    def _signed(self, messages: Sequence[Message], text: str, marks: tuple[str, str], behind: str) -> list[Span]:
        signed = [_signed(one, marks, behind) if one["role"] == "assistant" else one for one in messages]
        found = _between(self.renderer.render(signed, False), text, marks)
        if len(found) != sum(message["role"] == "assistant" for message in messages):
            raise ValueError(f"the chat template leaves out an answer{MARK_THEM}")
        return found

    def _asked(self, messages: Sequence[Message], text: str, begun: int) -> int:
        """Where the answer to these messages, of which a part begins at `begun`, begins."""
        try:
            asked = self.renderer.render(messages, True)
        except ValueError:  # nothing is ever asked for there
            return begun
        return min(begun, len(asked)) if text.startswith(asked) else begun

    def _stopped(self, text: str, end: int) -> int:
        """The end of an answer with the text that stops a model without an end of turn."""
        stop = next((stop for stop in self.renderer.template.stop if text.startswith(stop, end)), "")
        return end + len(stop)

    def _whole(self, ids: np.ndarray, answers: np.ndarray) -> Told:
        """With end-of-text before it where the template leaves that to others, and behind a last answer without end."""
        before = self.renderer.template.after_end or not len(ids)
        open_end = bool(len(ids)) and bool(answers[-1]) and int(ids[-1]) not in self._ordinary
        ids = np.concatenate([[self.tokenizer.eot] * before, ids, [self.tokenizer.eot] * open_end]).astype(np.int64)
        answers = np.concatenate([[False] * before, answers, [True] * open_end]).astype(bool)
        if not answers.any():
            raise ValueError("the tokenizer makes no token of its answers")
        if ids.max() >= self.most:
            token = self.tokenizer.backend.id_to_token(int(ids.max()))
            raise ValueError(f"token {int(ids.max())} ({token!r}) is beyond the model's vocabulary of {self.most}")
        return Told(ids, answers)


def _learned(messages: Sequence[Message], spans: list[Span]) -> list[Span]:
    """Without the answers that are not to be learned. ValueError: they cannot be told."""
    wanted = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    if all(wanted):
        return spans
    if len(spans) != len(wanted):
        told = f"the chat template marks {len(spans)} answers with {{% generation %}} where there are {len(wanted)}"
        raise ValueError(f"{told}, so the one that is not to be learned cannot be told")
    return [span for span, learned in zip(spans, wanted, strict=True) if learned]


def _special(tokenizer: Tokenizer) -> set[int]:
    return {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}


def _unused(text: str) -> tuple[str, str]:
    """Two characters that are not in a text."""
    used = set(text)
    free = (character for character in map(chr, range(0xE100, 0x10FFFE)) if character not in used)
    return next(free), next(free)


def _signed(message: Message, marks: tuple[str, str], behind: str) -> Message:
    """With signs around its text, or what is `behind` the last such sign of a reasoning's end; white space at the ends
    outside, which templates like to strip."""
    thought, end, content = message["content"].rpartition(behind) if behind else ("", "", message["content"])
    core = content.strip()
    if not core:
        raise ValueError(f"an answer says nothing behind its {THOUGHT}, so it cannot be told{MARK_THEM}")
    before, _, after = content.partition(core)
    return message | {"content": f"{thought}{end}{before}{marks[0]}{core}{marks[1]}{after}"}


def _between(signed: str, text: str, marks: tuple[str, str]) -> list[Span]:
    """Where what lies between pairs of signs stands in the text without them."""
    if signed.translate(dict.fromkeys(map(ord, "".join(marks)))) != text:
        told = "the chat template writes answers otherwise when more is said or they are marked, so they cannot be told"
        raise ValueError(f"{told} from the rest{MARK_THEM}")
    found, place, begun = [], 0, None
    for part in re.split(f"([{marks[0]}{marks[1]}])", signed):
        if part == marks[0] and begun is None:
            begun = place
        elif part == marks[1] and begun is not None:
            found.append((begun, place))
            begun = None
        elif part in marks:
            raise ValueError(f"the chat template takes an answer apart, so it cannot be told from the rest{MARK_THEM}")
        else:
            place += len(part)
    return found
