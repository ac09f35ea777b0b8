"""From the logits of many texts to the next token of each: what one text draws does not depend on the others.

The most likely token of every row is found in one pass, which also tells what is not finite. Rows that draw are worked
on together by what they draw from: all tokens, or what top-k, top-p and min-p leave. Filters and draws are those of
`atma.sampling`.
"""

import math
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from atma.ops.rows import largest
from atma.serve.guides import restrict
from atma.serve.request import Logprob, Request
from atma.serve.sequence import Sequence

NOT_FINITE = ValueError("the model's logits are not finite")


def drawn(logits: Tensor, sequences: Many[Sequence], end: int) -> tuple[list[int | Exception], dict[int, Logprob]]:
    """The next token of each row, or why there is none; and the scores, by row, that were asked for. What a structure
    forbids becomes −inf in `logits` itself."""
    try:
        restrict(logits, [sequence.guide for sequence in sequences])
        tokens = choose(logits, sequences, end)
        found = [_unwritable(s) if token is None else token for s, token in zip(sequences, tokens, strict=True)]
        return found, _scored(sequences, tokens, logits)
    except Exception as error:  # whatever it is, it ends those whose it is and no others
        if len(sequences) == 1:
            return [error], {}
    alone = [drawn(logits[i : i + 1], [sequence], end) for i, sequence in enumerate(sequences)]
    scored = {i: one for i, (_, own) in enumerate(alone) for one in own.values()}
    return [token for tokens, _ in alone for token in tokens], scored


def choose(logits: Tensor, sequences: Many[Sequence], end: int) -> list[int | None]:
    """The next token of each row of float logits (N, V); None where they are not finite. `end`, the end-of-text, is
    never penalised."""
    logits = _adjusted(logits, sequences, end)
    chosen: list[int | None] = [None if token < 0 else token for token in largest(logits).tolist()]
    groups: dict[str, list[int]] = {}
    for i, sequence in enumerate(sequences):
        if not sequence.greedy and chosen[i] is not None:
            groups.setdefault(_kind(sequence.request), []).append(i)
    for kind, rows in groups.items():
        some = logits if len(rows) == len(sequences) else logits[rows]
        requests = [sequences[i].request for i in rows]
        draws = [torch.rand(1, generator=sequences[i].random, dtype=torch.float64) for i in rows]
        warm = some.double() / _column([r.temperature for r in requests], some)
        tokens = _drawn(warm, requests, torch.stack(draws).to(some.device), kind == "filtered")
        for i, token in zip(rows, tokens.tolist(), strict=True):
            chosen[i] = token
    return chosen


def scores(logits: Tensor, tokens: Many[int], best: int) -> list[Logprob]:
    """Each row's log-probability of its token, and its `best` most likely tokens. float logits (N, V)."""
    logprobs = logits.float().log_softmax(-1)
    of_token = logprobs.gather(1, torch.tensor([tokens], device=logits.device).T)[:, 0].tolist()
    top = logprobs.topk(min(best, logits.shape[-1]), -1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ranked = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return [Logprob(t, p, r) for t, p, r in zip(tokens, of_token, ranked, strict=True)]


def _scored(sequences: Many[Sequence], tokens: Many[int | None], logits: Tensor) -> dict[int, Logprob]:
    """Log-probabilities of the rows that asked for them."""
    wanted = {i: s.request.logprobs for i, s in enumerate(sequences) if s.request.logprobs is not None}
    rows = [i for i in wanted if tokens[i] is not None]
    if not rows:
        return {}
    found = scores(logits[rows], [tokens[i] or 0 for i in rows], max(wanted.values()))
    return {i: one._replace(best=one.best[: wanted[i]]) for i, one in zip(rows, found, strict=True)}


def _unwritable(sequence: Sequence) -> Exception:
    """Why no token can be drawn: all are forbidden, or the logits are none."""
    guide = sequence.guide
    return NOT_FINITE if guide is None or guide.bits.any() else guide.stuck()


def _kind(request: Request) -> str:
    return "plain" if request.top_k == 0 and request.top_p == 1 and request.min_p == 0 else "filtered"


def _column(values: Many[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _drawn(logits: Tensor, requests: Many[Request], draws: Tensor, filtered: bool) -> Tensor:
    """One token for each row of float64 logits; draws (N, 1) uniform in [0, 1)."""
    ids = None
    if filtered:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        logits = _filtered(logits, requests)
    cumulative = logits.softmax(-1).cumsum(-1)
    rank = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    rank = rank.clamp(max=logits.shape[-1] - 1)
    return (rank if ids is None else ids.gather(1, rank))[:, 0]


def _filtered(logits: Tensor, requests: Many[Request]) -> Tensor:
    """Sorted logits (N, V) with −inf where a row's top-k, then top-p, then min-p end."""
    size = logits.shape[-1]
    rank = torch.arange(size, device=logits.device)
    last = _column([r.top_k or size for r in requests], logits)
    logits = logits.masked_fill(rank >= last, -torch.inf)
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    most = _column([r.top_p if r.top_p < 1 else math.inf for r in requests], logits)
    logits = logits.masked_fill(before >= most, -torch.inf)
    least = _column([math.log(r.min_p) if r.min_p else -math.inf for r in requests], logits)
    return logits.masked_fill(logits < logits[:, :1] + least, -torch.inf)


def _adjusted(logits: Tensor, sequences: Many[Sequence], end: int) -> Tensor:
    """Logits after each row's own penalties and biases, without ends before its least length; the given tensor is left
    as it is."""
    changed = None
    for i, sequence in enumerate(sequences):
        if not sequence.adjusts:
            continue
        request = sequence.request
        repeats = request.repetition_penalty != 1
        counts = request.presence_penalty != 0 or request.frequency_penalty != 0
        if changed is None:
            changed = logits.clone()
        row = changed[i]
        if repeats:
            seen, penalty = _seen(sequence, row, end), request.repetition_penalty
            row = torch.where(seen, torch.where(row > 0, row / penalty, row * penalty), row)
        if counts:
            counted = _counts(sequence, row)
            row = row - request.presence_penalty * (counted > 0) - request.frequency_penalty * counted
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=row.device)
            row = row.index_add(0, ids, torch.tensor(list(request.logit_bias.values()), dtype=row.dtype).to(row.device))
        if sequence.written < request.min_tokens:
            ends = [*request.stop_tokens, *(() if request.ignore_end else (end,))]
            ends = ends if sequence.guide is None else sequence.guide.spared(ends)
            row = row.index_fill(0, torch.tensor(ends, dtype=torch.long, device=row.device), -torch.inf)
        changed[i] = row
    return logits if changed is None else changed


def _seen(sequence: Sequence, row: Tensor, end: int) -> Tensor:
    if sequence.seen is None:
        sequence.seen = torch.zeros(row.shape, dtype=torch.bool, device=row.device)
        sequence.seen[torch.tensor(sequence.tokens, device=row.device)] = True
    sequence.seen[end] = False
    return sequence.seen


def _counts(sequence: Sequence, row: Tensor) -> Tensor:
    if sequence.counts is None:
        written = torch.tensor(sequence.tokens[sequence.prompt_length :], dtype=torch.long, device=row.device)
        sequence.counts = torch.bincount(written, minlength=len(row)).to(row.dtype)
    return sequence.counts
