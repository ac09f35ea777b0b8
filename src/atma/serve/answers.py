"""From tokens to what callers see: text in whole characters, stop strings, events, and the handles they add up in."""

from atma.serve.handle import Handle
from atma.serve.request import Event, Finish, Logprob, Request, RequestError
from atma.serve.sequence import Sequence
from atma.tokenizer import Tokenizer


class Answers:
    """The events of the current step, and the handles of the requests under way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.handles: dict[str, Handle] = {}
        self.events: list[Event] = []
        self._bytes: dict[int, bytes] = {}

    def open(self, identity: str, n: int, keep: bool) -> Handle:
        """The handle of a new request."""
        self.handles[identity] = handle = Handle(identity, n, keep)
        return handle

    def begin(self, sequence: Sequence) -> None:
        """The prompt has been read: with echo it is the first of the answer, and its vector is all of one."""
        request = sequence.request
        if request.embed:
            self._embed(sequence)
        elif request.echo:
            plain = isinstance(request.prompt, str) and not request.special
            text = request.prompt if plain else self.tokenizer.decode(sequence.tokens)
            scored, usage = tuple(sequence.prompt_logprobs) or None, sequence.usage()
            told = Event(sequence.id, sequence.index, tuple(sequence.tokens), str(text), scored, usage=usage)
            self.events.append(told)

    def add(self, sequence: Sequence, token: int, logprob: Logprob | None) -> Finish | None:
        """One more token of an answer; why the answer ends with it, if it does."""
        sequence.append(token)
        text, finish = self._text(sequence, token)
        sequence.finish = finish
        scored = None if logprob is None else (logprob,)
        told = Event(sequence.id, sequence.index, (token,), text, scored, finish, sequence.usage())
        self.events.append(told if sequence.stream.found is None else told._replace(stop=sequence.stream.found))
        return finish

    def end(self, sequence: Sequence, finish: Finish, error: RequestError | None = None) -> None:
        """An end that no token brought."""
        sequence.finish = finish
        text = sequence.stream.flush()
        self.events.append(Event(sequence.id, sequence.index, (), text, None, finish, sequence.usage(), error))

    def forget(self) -> list[tuple[str, int]]:
        """No request is under way any more; the choices that had not ended."""
        open_ = [(h.id, o.index) for h in self.handles.values() for o in h.outputs if o.finish_reason is None]
        self.handles, self.events = {}, []
        return open_

    def deliver(self) -> list[Event]:
        """All events since the last call, now in their handles too; requests that are done are forgotten."""
        events, self.events = self.events, []
        for event in events:
            handle = self.handles[event.id]
            handle.take(event)
            if event.finish_reason is not None and handle.done:
                del self.handles[event.id]
        return events

    def _text(self, sequence: Sequence, token: int) -> tuple[str, Finish | None]:
        request, stream = sequence.request, sequence.stream
        ends = token in request.stop_tokens or (token == self.tokenizer.eot and not request.ignore_end)
        ends = ends or (sequence.guide is not None and sequence.guide.ended)
        if ends and not request.include_stop:
            return stream.flush(), "stop"
        text = stream.push(self._spelled(token, request), sequence.written > request.min_tokens)
        if ends and not stream.stopped:
            return text + stream.flush(), "stop"
        if stream.stopped:
            return text, "stop"
        if sequence.written == request.max_tokens:
            return text + stream.flush(), "length"
        return text, None

    def _embed(self, sequence: Sequence) -> None:
        assert sequence.embedding is not None
        if not bool(sequence.embedding.isfinite().all()):
            raise ValueError("the model's hidden states are not finite")
        sequence.finish = "stop"
        told = Event(sequence.id, sequence.index, (), "", None, "stop", sequence.usage(), None, sequence.embedding)
        self.events.append(told)

    def _spelled(self, token: int, request: Request) -> bytes:
        """The bytes of a token's text; a special token has none unless it is spelled."""
        if token not in self._bytes:
            self._bytes[token] = self.tokenizer.token_bytes(token)
        found = self._bytes[token]
        bare = found or not (request.special or token in request.spelled)
        return found if bare else (self.tokenizer.backend.id_to_token(token) or "").encode()


def prompt_tokens(request: Request, tokenizer: Tokenizer, most: int) -> list[int]:
    """The prompt's tokens; RequestError for what is wrong with the request. `most`: positions there is memory for."""
    request.check()
    tokens = _encoded(request, tokenizer)
    vocabulary, holes = tokenizer.vocab_size, frozenset(tokenizer.holes.tolist())
    given = ("prompt", tokens), ("logit_bias", request.logit_bias), ("stop_tokens", request.stop_tokens)
    for name, ids in given:
        bad = next((i for i in ids if not 0 <= i < vocabulary), None)
        if bad is not None:
            raise RequestError("invalid", f"'{name}': token {bad} is outside the vocabulary of {vocabulary}", name)
        if holes.intersection(ids):
            bad = min(holes.intersection(ids))
            raise RequestError("invalid", f"'{name}': no token of the tokenizer has the id {bad}", name)
    if request.max_tokens < 1 and not (request.echo or request.embed):
        raise RequestError("invalid", "'max_tokens' must be at least 1 without echo, not 0", "max_tokens")
    if len(tokens) + max(0, request.max_tokens - 1) > most:
        both = f"{len(tokens):,} tokens of prompt and {request.max_tokens:,} of answer"
        raise RequestError("too_long", f"{both} are more than the {most:,} that there is memory for", "max_tokens")
    return tokens


def _encoded(request: Request, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(request.prompt, str):
        if not request.prompt:
            raise RequestError("invalid", "'prompt' has no tokens", "prompt")
        return list(request.prompt)
    try:
        return [*tokenizer.beginning, *tokenizer.encode(request.prompt)] or [tokenizer.eot]
    except ValueError as error:
        raise RequestError("invalid", f"'prompt': {error}", "prompt") from None
