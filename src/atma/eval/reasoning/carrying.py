"""People who go to rooms and take, drop and give things: qa1, qa2, qa3, qa5, qa6, qa7, qa8.

Everyone's place is unknown until told. A thing is taken only where it lies (anywhere, before it is first seen), dropped
by who holds it, and given to someone in the same room.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from numpy.random import Generator

from atma.eval.reasoning.worlds import Question, Story, Task, between, pick

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
GIVERS = ("Mary", "Fred", "Bill", "Jeff")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
COUNTS = ("none", "one", "two", "three")
Kind = Literal["move", "take", "drop", "give"]
SAID: dict[Kind, tuple[str, ...]] = {
    "move": ("went to the {}", "moved to the {}", "travelled to the {}", "journeyed to the {}"),
    "take": ("took the {}", "picked up the {}", "grabbed the {}", "got the {}"),
    "drop": ("dropped the {}", "put down the {}", "left the {}", "discarded the {}"),
    "give": ("gave the {} to {}", "handed the {} to {}", "passed the {} to {}"),
}


class Event(NamedTuple):
    """`who` moves to the room `what`, takes or drops the thing `what`, or gives it to `to`."""

    kind: Kind
    who: str
    what: str
    to: str = ""


class Stop(NamedTuple):
    """A room that a thing has come to, the move that brought it or its taker there, and how it came into hand."""

    room: str
    move: int
    taken: int


class World:
    """Where everyone and everything is, and which event each of it is known from."""

    def __init__(self) -> None:
        self.at: dict[str, tuple[str, int]] = {}
        """Of a person: the room, and the move."""
        self.held: dict[str, tuple[str, int]] = {}
        """Of a thing: who holds it, and the taking or giving."""
        self.lies: dict[str, tuple[str, int, int]] = {}
        """Of a thing that was dropped: the room, the dropper's move, and the dropping."""
        self.trail: dict[str, list[Stop]] = {}
        """Of a thing: the rooms it was in, in order."""

    def apply(self, event: Event, index: int) -> None:
        """Let an event happen. It must be possible."""
        if event.kind == "move":
            self.at[event.who] = (event.what, index)
            for thing, (holder, taken) in self.held.items():
                if holder == event.who:
                    self.trail[thing].append(Stop(event.what, index, taken))
        elif event.kind == "drop":
            del self.held[event.what]
            self.lies[event.what] = (*self.at[event.who], index)
        else:
            self.held.pop(event.what, None)  # in the order in which things came into hand
            self.held[event.what] = (event.to or event.who, index)
            self.lies.pop(event.what, None)
            self.trail.setdefault(event.what, [Stop(*self.at[event.who], index)])

    def holding(self, who: str) -> list[str]:
        """What a person holds, in the order in which it was taken."""
        return [thing for thing, (holder, _) in self.held.items() if holder == who]

    def possible(self, kind: Kind, people: Sequence[str]) -> list[Event]:
        """Events of a kind that can happen now."""
        if kind == "move":
            return [Event(kind, p, room) for p in people for room in ROOMS if self.at.get(p, ("",))[0] != room]
        placed = [person for person in people if person in self.at]
        if kind == "take":
            free = [thing for thing in THINGS if thing not in self.held]
            return [Event(kind, p, thing) for p in placed for thing in free if self._near(p, thing)]
        if kind == "drop":
            return [Event(kind, holder, thing) for thing, (holder, _) in self.held.items()]
        near = [(a, b) for a, b in itertools.permutations(placed, 2) if self.at[a][0] == self.at[b][0]]
        return [Event(kind, a, thing, b) for a, b in near for thing in self.holding(a)]

    def _near(self, person: str, thing: str) -> bool:
        return thing not in self.lies or self.lies[thing][0] == self.at[person][0]


def replay(events: Sequence[Event]) -> World:
    """The world after the events."""
    world = World()
    for index, event in enumerate(events):
        world.apply(event, index)
    return world


def say(rng: Generator, event: Event) -> str:
    """An event as a sentence, in one of several wordings."""
    return f"{event.who} {pick(rng, SAID[event.kind]).format(event.what, event.to)}."


def live(rng: Generator, kinds: Sequence[Kind], people: Sequence[str], count: int) -> list[Event]:
    """So many events that follow one another."""
    world, events = World(), []
    while len(events) < count:
        possible = world.possible(pick(rng, kinds), people)
        if possible:
            events.append(pick(rng, possible))
            world.apply(events[-1], len(events) - 1)
    return events


def _where_is_who(events: Sequence[Event]) -> list[Question]:
    at = replay(events).at
    return [Question(f"Where is {who}?", room, (move,)) for who, (room, move) in at.items()]


def _where_is_what(events: Sequence[Event]) -> list[Question]:
    world = replay(events)
    known = {thing: (*world.at[holder], taken) for thing, (holder, taken) in world.held.items()} | world.lies
    return [
        Question(f"Where is the {thing}?", room, tuple(sorted((move, index))))
        for thing, (room, move, index) in known.items()
    ]


def _where_was_what(events: Sequence[Event]) -> list[Question]:
    """Only of rooms that a thing was in once, carried there from the one before by who held it there."""
    found = []
    for thing, stops in replay(events).trail.items():
        for before, stop in itertools.pairwise(stops):
            once = sum(other.room == stop.room for other in stops) == 1
            support = tuple(sorted({before.move, stop.move, stop.taken}))
            if once and before.taken == stop.taken:
                found.append(Question(f"Where was the {thing} before the {stop.room}?", before.room, support))
    return found


def _who_gave_what(events: Sequence[Event]) -> list[Question]:
    """Only where one giving alone fits the question."""
    found: dict[str, list[Question]] = {}
    for index, event in enumerate(events):
        if event.kind == "give":
            _, giver, thing, receiver = event
            for text, answer in (
                (f"Who gave the {thing} to {receiver}?", giver),
                (f"What did {giver} give to {receiver}?", thing),
                (f"Who did {giver} give the {thing} to?", receiver),
                (f"Who gave the {thing}?", giver),
                (f"Who received the {thing}?", receiver),
            ):
                found.setdefault(text, []).append(Question(text, answer, (index,)))
    return [questions[0] for questions in found.values() if len(questions) == 1]


def _is_who_there(events: Sequence[Event]) -> list[Question]:
    """Rooms that someone is not in are such as were told of."""
    world = replay(events)
    told = dict.fromkeys(event.what for event in events)
    return [
        Question(f"Is {who} in the {room}?", "yes" if room == there else "no", (move,))
        for who, (there, move) in world.at.items()
        for room in told
    ]


def _hands(events: Sequence[Event]) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """Who has had something in hand, what they hold, and every event of their hands."""
    world = replay(events)
    touched: dict[str, list[int]] = {}
    for index, event in enumerate(events):
        if event.kind != "move":
            touched.setdefault(event.who, []).append(index)
    return [(who, world.holding(who), tuple(indices)) for who, indices in touched.items()]


def _how_many(events: Sequence[Event]) -> list[Question]:
    return [
        Question(f"How many objects is {who} carrying?", COUNTS[len(things)], support)
        for who, things, support in _hands(events)
    ]


def _what_is_carried(events: Sequence[Event]) -> list[Question]:
    return [
        Question(f"What is {who} carrying?", ",".join(things) or "nothing", support)
        for who, things, support in _hands(events)
    ]


def _teller(
    ask: Callable[[Sequence[Event]], list[Question]],
    kinds: Sequence[Kind],
    least: int,
    most: int,
    people: Sequence[str] = PEOPLE,
) -> Callable[[Generator], Story]:
    def tell(rng: Generator) -> Story:
        events = live(rng, kinds, people, between(rng, least, most))
        return Story(tuple(say(rng, event) for event in events), tuple(ask(events)))

    return tell


MOVES: tuple[Kind, ...] = ("move",)
TAKES: tuple[Kind, ...] = ("move", "take", "drop")
MOSTLY_MOVES: tuple[Kind, ...] = ("move", "move", "take", "drop")
MOSTLY_TAKES: tuple[Kind, ...] = ("move", "take", "take", "drop")
GIVES: tuple[Kind, ...] = ("move", "move", "take", "give", "give")
LISTS = ("nothing", *(",".join(order) for size in (1, 2, 3) for order in itertools.permutations(THINGS, size)))
TASKS = (
    Task(1, "single supporting fact", ROOMS, _teller(_where_is_who, MOVES, 2, 10)),
    Task(2, "two supporting facts", ROOMS, _teller(_where_is_what, TAKES, 4, 14)),
    Task(3, "three supporting facts", ROOMS, _teller(_where_was_what, MOSTLY_MOVES, 6, 18)),
    Task(5, "three argument relations", (*GIVERS, *THINGS), _teller(_who_gave_what, GIVES, 6, 14, GIVERS)),
    Task(6, "yes/no questions", ("yes", "no"), _teller(_is_who_there, MOVES, 2, 10)),
    Task(7, "counting", COUNTS, _teller(_how_many, MOSTLY_TAKES, 4, 14)),
    Task(8, "lists and sets", LISTS, _teller(_what_is_carried, MOSTLY_TAKES, 4, 14)),
)
