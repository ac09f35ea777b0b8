"""From a request's body to requests of the engine."""

from collections.abc import Collection

from atma.serve.http.bodies import ChatBody, CompletionBody, SamplingBody
from atma.serve.http.errors import ApiError
from atma.serve.http.neutral import shown
from atma.serve.request import Request

SEEDS = 2**63
COLDEST = 1e-9
"""Below it only logits that rounding makes equal could be told apart from the largest."""


def completion_requests(body: CompletionBody, ends: tuple[int, ...]) -> list[Request]:
    """One request for each prompt; `ends` are the tokens that end the model's turns."""
    prompt = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    return [_request(body, one, body.max_tokens, body.logprobs, body.echo, (), ends) for one in prompts]


def chat_request(
    body: ChatBody, tokens: list[int], stop: tuple[str, ...], ends: tuple[int, ...], most: int, otherwise: int
) -> Request:
    """The request for a rendered chat; `stop` is the template's own, `most` what there is room for, `otherwise` the
    length where none is named."""
    limits = [most if n == -1 else n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    length = min(limits, default=max(min(most, otherwise), body.min_tokens))
    return _request(body, tokens, length, body.best, False, stop, ends)


def check_model(asked: str | None, served: str, adapters: Collection[str] = ()) -> None:
    """ApiError for a model that is not served here, nor one of the adapters on it."""
    if asked is not None and asked != served and asked not in adapters:
        there = ", ".join(f"'{name}'" for name in (served, *adapters))
        raise ApiError(404, "model_not_found", f"no model {shown(asked)} here; this server has {there}", "model")


def _request(
    body: SamplingBody,
    prompt: str | list[int],
    max_tokens: int,
    logprobs: int | None,
    echo: bool,
    stop: tuple[str, ...],
    ends: tuple[int, ...],
) -> Request:
    return Request(
        prompt,
        max_tokens=max_tokens,
        temperature=body.temperature if body.temperature > COLDEST else 0.0,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else body.seed % SEEDS,
        n=body.n,
        stop=(*body.stop, *stop),
        stop_tokens=(*body.stop_token_ids, *(() if body.ignore_eos else ends)),
        ignore_end=body.ignore_eos,
        min_tokens=body.min_tokens,
        include_stop=body.include_stop_str_in_output,
        special=not body.skip_special_tokens,
        cache=body.cache_prompt,
        logprobs=logprobs,
        structure=body.response_format or body.structured_outputs,
        echo=echo,
        salt=body.cache_salt,
    )
