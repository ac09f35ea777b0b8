"""Kinds, sizes and motives: qa15, qa16, qa18, qa20, deduction, induction, transitivity, and reasons."""

import itertools
from collections.abc import Sequence

from numpy.random import Generator

from atma.eval.reasoning.carrying import PEOPLE, SAID
from atma.eval.reasoning.worlds import Question, Story, Task, between, pick, some

PLURALS = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
NAMES = ("Gertrude", "Winona", "Jessica", "Emily", "Lily", "Bernhard", "Greg", "Brian", "Julius")
ANIMALS: tuple[str, ...] = ("lion", "frog", "swan", "rhino")
COLOURS: tuple[str, ...] = ("white", "green", "yellow", "gray")
SIZED = ("box", "chest", "suitcase", "container", "chocolate")
MOTIVES = {
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "bored": ("garden", "football"),
    "tired": ("bedroom", "pajamas"),
}
"""Where each leads, and what is then taken there."""


def _deduction(rng: Generator) -> Story:
    """What a kind fears is what each of the kind fears."""
    kinds = list(PLURALS)
    fears = {kind: pick(rng, [other for other in kinds if other != kind]) for kind in kinds}
    names = some(rng, NAMES, 4)
    members = {name: pick(rng, kinds) for name in names}
    relations = some(rng, [*fears.items(), *members.items()], 8)
    facts = tuple(
        f"{PLURALS[one].capitalize()} are afraid of {PLURALS[other]}." if one in fears else f"{one} is a {other}."
        for one, other in relations
    )
    at = {one: index for index, (one, _) in enumerate(relations)}
    questions = [
        Question(f"What is {name} afraid of?", fears[kind], tuple(sorted((at[name], at[kind]))))
        for name, kind in members.items()
    ]
    return Story(facts, tuple(questions))


def _induction(rng: Generator) -> Story:
    """All of a kind whose colour is told have one colour, and so has the one whose colour is not told."""
    colours = dict(zip(ANIMALS, some(rng, COLOURS, 4), strict=True))
    asked, *known = some(rng, NAMES, 5)
    kinds = {name: pick(rng, ANIMALS) for name in known}
    kinds[asked] = pick(rng, list(kinds.values()))
    told = [(name, f"a {kind}") for name, kind in kinds.items()] + [(name, colours[kinds[name]]) for name in known]
    told = some(rng, told, len(told))
    like = next(name for name, _ in told if name != asked and kinds[name] == kinds[asked])
    support = tuple(i for i, (name, what) in enumerate(told) if name in (like, asked))
    question = Question(f"What color is {asked}?", colours[kinds[asked]], support)
    return Story(tuple(f"{name} is {what}." for name, what in told), (question,))


def _sizes(rng: Generator) -> Story:
    """Asked of two things that only others between them compare."""
    order = some(rng, SIZED, len(SIZED))
    pairs = some(rng, list(itertools.combinations(order, 2)), between(rng, 4, 6))
    facts = tuple(
        f"The {big} is bigger than the {small}." if rng.integers(2) else f"The {small} fits inside the {big}."
        for big, small in pairs
    )
    questions = []
    for big, small in itertools.combinations(order, 2):
        chain = _chain(pairs, big, small)
        if chain is not None and len(chain) > 1:
            for one, other, found in ((big, small, "yes"), (small, big, "no")):
                questions.append(Question(f"Is the {one} bigger than the {other}?", found, chain))
                questions.append(Question(f"Does the {other} fit in the {one}?", found, chain))
    return Story(facts, tuple(questions))


def _chain(pairs: Sequence[tuple[str, str]], big: str, small: str) -> tuple[int, ...] | None:
    """Indices of the fewest facts that make one thing bigger than another, None where none do."""
    reached: dict[str, tuple[int, ...]] = {big: ()}
    waiting = [big]
    while waiting:
        here = waiting.pop(0)
        for index, (one, other) in enumerate(pairs):
            if one == here and other not in reached:
                reached[other] = (*reached[here], index)
                waiting.append(other)
    return tuple(sorted(reached[small])) if small in reached else None


def _motives(rng: Generator) -> Story:
    """People feel, go, and take, in this order, each as far as the story comes."""
    people = some(rng, PEOPLE, between(rng, 2, len(PEOPLE)))
    motive = {who: pick(rng, list(MOTIVES)) for who in people}
    steps = [who for who in people for _ in range(between(rng, 1, 3))]
    facts: list[str] = []
    done: dict[str, list[int]] = {}
    for who in some(rng, steps, len(steps)):
        room, thing = MOTIVES[motive[who]]
        said = ("is " + motive[who], pick(rng, SAID["move"]).format(room), pick(rng, SAID["take"]).format(thing))
        facts.append(f"{who} {said[len(done.setdefault(who, []))]}.")
        done[who].append(len(facts) - 1)
    questions = []
    for who, (felt, *acts) in done.items():
        room, thing = MOTIVES[motive[who]]
        if not acts:
            questions.append(Question(f"Where will {who} go?", room, (felt,)))
        for act, text in zip(acts, (f"go to the {room}", f"get the {thing}"), strict=False):
            questions.append(Question(f"Why did {who} {text}?", motive[who], (felt, act)))
    return Story(tuple(facts), tuple(questions))


TASKS = (
    Task(15, "basic deduction", tuple(PLURALS), _deduction),
    Task(16, "basic induction", COLOURS, _induction),
    Task(18, "size reasoning", ("yes", "no"), _sizes),
    Task(20, "agent's motivations", (*MOTIVES, "kitchen", "garden", "bedroom"), _motives),
)
