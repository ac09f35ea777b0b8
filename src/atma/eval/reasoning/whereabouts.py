"""Statements about where people are or were: qa9 to qa14, negation, indefinite knowledge, coreference, and time."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from numpy.random import Generator

from atma.eval.reasoning.carrying import PEOPLE, ROOMS, SAID
from atma.eval.reasoning.worlds import Question, Story, Task, between, pick, some

PRONOUNS = {"Mary": "she", "John": "he", "Sandra": "she", "Daniel": "he"}
PLACES = ("park", "cinema", "school", "kitchen", "bedroom", "office")
TIMES = ("Yesterday", "This morning", "This afternoon", "This evening")
"""In their order."""
THEN = ("Then", "Afterwards", "After that", "Following that")
Modality = Literal["in", "not in", "either"]


class Statement(NamedTuple):
    """People are in the one place, not in it, or in either of two."""

    who: tuple[str, ...]
    modality: Modality
    places: tuple[str, ...]


def answer(statement: Statement, place: str) -> str | None:
    """Whether who it is about is at a place: yes, no, maybe, or None where nobody can tell."""
    named = place in statement.places
    if statement.modality == "in":
        return "yes" if named else "no"
    if statement.modality == "either":
        return "maybe" if named else "no"
    return "no" if named else None


def latest(statements: Sequence[Statement]) -> dict[str, int]:
    """The index of the last statement about each person."""
    return {who: index for index, statement in enumerate(statements) for who in statement.who}


def _is_who_there(statements: Sequence[Statement]) -> list[Question]:
    """Of places that were told of; "no" is asked of others than the one just denied only where that is known."""
    told = list(dict.fromkeys(place for statement in statements for place in statement.places))
    return [
        Question(f"Is {who} in the {place}?", found, (index,))
        for who, index in latest(statements).items()
        for place in told
        if (found := answer(statements[index], place)) is not None
    ]


def _negation(rng: Generator) -> Story:
    """Someone leaves the room they were last in ("no longer"), or is not in one while theirs is unknown ("not")."""
    statements: list[Statement] = []
    facts = []
    for _ in range(between(rng, 2, 10)):
        who = pick(rng, PEOPLE)
        known = latest(statements).get(who)
        last = statements[known] if known is not None else None
        if rng.integers(3) or (last is not None and last.modality == "not in"):
            others = [room for room in ROOMS if last is None or room not in last.places]
            statements.append(Statement((who,), "in", (pick(rng, others),)))
            facts.append(_arrives(rng, who, statements[-1].places[0]))
        else:
            room = pick(rng, ROOMS) if last is None else last.places[0]
            statements.append(Statement((who,), "not in", (room,)))
            facts.append(f"{who} is {'not' if last is None else 'no longer'} in the {room}.")
    return Story(tuple(facts), tuple(_is_who_there(statements)))


def _indefinite(rng: Generator) -> Story:
    statements, facts = [], []
    for _ in range(between(rng, 2, 10)):
        who = pick(rng, PEOPLE)
        if rng.integers(2):
            one, other = some(rng, PLACES, 2)
            statements.append(Statement((who,), "either", (one, other)))
            facts.append(f"{who} is either in the {one} or the {other}.")
        else:
            statements.append(Statement((who,), "in", (pick(rng, PLACES),)))
            facts.append(_arrives(rng, who, statements[-1].places[0]))
    return Story(tuple(facts), tuple(_is_who_there(statements)))


def _arrives(rng: Generator, who: str, place: str) -> str:
    return f"{who} {pick(rng, (*SAID['move'], 'is in the {}')).format(place)}."


def _goes(rng: Generator, who: str, place: str) -> str:
    return f"{who} {pick(rng, SAID['move']).format(place)}."


def _coreference(rng: Generator) -> Story:
    """Sentences in pairs; the second says only "she" or "he"."""
    return _pairs(rng, 1)


def _compound(rng: Generator) -> Story:
    """Pairs of sentences about two people; the second says only "they"."""
    return _pairs(rng, 2)


def _pairs(rng: Generator, together: int) -> Story:
    facts: list[str] = []
    known: dict[str, tuple[str, int]] = {}
    for turn in range(between(rng, 1, 5)):
        group = some(rng, PEOPLE, together)
        first, second = some(rng, ROOMS, 2)
        pronoun = PRONOUNS[group[0]] if together == 1 else "they"
        facts += [_goes(rng, " and ".join(group), first), f"{pick(rng, THEN)} {_goes(rng, pronoun, second)}"]
        known |= dict.fromkeys(group, (second, 2 * turn))
    questions = [Question(f"Where is {who}?", room, (at, at + 1)) for who, (room, at) in known.items()]
    return Story(tuple(facts), tuple(questions))


def _conjunction(rng: Generator) -> Story:
    groups = [tuple(some(rng, PEOPLE, 2)) for _ in range(between(rng, 2, 10))]
    statements = [Statement(group, "in", (pick(rng, ROOMS),)) for group in groups]
    facts = tuple(_goes(rng, " and ".join(statement.who), statement.places[0]) for statement in statements)
    where = {who: (statements[index].places[0], index) for who, index in latest(statements).items()}
    return Story(facts, tuple(Question(f"Where is {who}?", room, (index,)) for who, (room, index) in where.items()))


class Visit(NamedTuple):
    """A person at a place at one of TIMES, by its index."""

    who: str
    place: str
    time: int


def _before(visits: Sequence[Visit]) -> list[Question]:
    """Where someone was before a place they were at once."""
    found = []
    for at, visit in enumerate(visits):
        own = [(other.time, i) for i, other in enumerate(visits) if other.who == visit.who]
        earlier = [one for one in own if one[0] < visit.time]
        once = sum(visits[i].place == visit.place for _, i in own) == 1
        if earlier and once:
            before = max(earlier)[1]
            text = f"Where was {visit.who} before the {visit.place}?"
            found.append(Question(text, visits[before].place, tuple(sorted((before, at)))))
    return found


def _time(rng: Generator) -> Story:
    """What several people did at several times, not told in the order of time."""
    visits: list[Visit] = []
    for who in some(rng, PEOPLE, between(rng, 2, 4)):
        place = ""
        for time in sorted(some(rng, range(len(TIMES)), between(rng, 2, 4))):
            place = pick(rng, [other for other in PLACES if other != place])
            visits.append(Visit(who, place, time))
    visits = some(rng, visits, len(visits))
    facts = tuple(f"{TIMES[visit.time]} {_goes(rng, visit.who, visit.place)}" for visit in visits)
    return Story(facts, tuple(_before(visits)))


TASKS = (
    Task(9, "simple negation", ("yes", "no"), _negation),
    Task(10, "indefinite knowledge", ("yes", "no", "maybe"), _indefinite),
    Task(11, "basic coreference", ROOMS, _coreference),
    Task(12, "conjunction", ROOMS, _conjunction),
    Task(13, "compound coreference", ROOMS, _compound),
    Task(14, "time reasoning", PLACES, _time),
)
