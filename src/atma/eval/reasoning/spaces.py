"""Things on a grid, each told to lie one step from another: qa4, qa17, qa19, relations, positions, and paths."""

import itertools

from numpy.random import Generator

from atma.eval.reasoning.carrying import ROOMS
from atma.eval.reasoning.worlds import Question, Story, Task, between, pick, some

Step = tuple[int, int]
COMPASS: dict[str, Step] = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
SIDES: dict[str, Step] = {"above": (0, 1), "below": (0, -1), "to the right of": (1, 0), "to the left of": (-1, 0)}
SHAPES = ("red square", "blue square", "pink rectangle", "yellow square", "red sphere", "triangle")
PATHS = tuple(
    f"{one},{other}"
    for one, other in itertools.product(COMPASS, COMPASS)
    if (COMPASS[one][0] + COMPASS[other][0], COMPASS[one][1] + COMPASS[other][1]) != (0, 0)
)
"""Of two steps, none of them back."""


def _reversed(step: Step) -> Step:
    return -step[0], -step[1]


def _two_steps(rng: Generator, relations: dict[str, Step], names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Two facts (one, relation, other) that tie three things, in a line or round a corner and never on one place.

    The middle one is in both. Facts are in random order, and each is told from either end.
    """
    outer, middle, last = some(rng, names, 3)
    first = pick(rng, list(relations))
    back = _reversed(relations[first])
    second = pick(rng, [name for name, step in relations.items() if step != back])
    facts = [_told(rng, relations, (outer, first, middle)), _told(rng, relations, (middle, second, last))]
    return some(rng, facts, 2)


def _told(rng: Generator, relations: dict[str, Step], fact: tuple[str, str, str]) -> tuple[str, str, str]:
    """The fact, or the same from the other end."""
    one, relation, other = fact
    inverse = {step: name for name, step in relations.items()}[_reversed(relations[relation])]
    return fact if rng.integers(2) else (other, inverse, one)


def _two_arguments(rng: Generator) -> Story:
    """Asked in the words of one fact, of either end, and only where no third room fits however far it may be."""
    facts = _two_steps(rng, COMPASS, ROOMS)
    [middle] = {facts[0][0], facts[0][2]} & {facts[1][0], facts[1][2]}
    axes = {COMPASS[relation][0] == 0 for _, relation, _ in facts}
    questions = []
    for index, (one, relation, other) in enumerate(facts):
        if len(axes) == 2 or other == middle:
            questions.append(Question(f"What is {relation} of the {other}?", one, (index,)))
        if len(axes) == 2 or one == middle:
            questions.append(Question(f"What is the {one} {relation} of?", other, (index,)))
    told = tuple(f"The {one} is {relation} of the {other}." for one, relation, other in facts)
    return Story(told, tuple(questions))


def _positions(rng: Generator) -> Story:
    """Of the two shapes that no fact names together. A shape that is neither above nor below is on the same level."""
    facts = _two_steps(rng, SIDES, SHAPES)
    [middle] = {facts[0][0], facts[0][2]} & {facts[1][0], facts[1][2]}
    place = {middle: (0, 0)}
    for one, relation, other in facts:
        x, y = SIDES[relation]
        place |= {one: (x, y)} if other == middle else {other: (-x, -y)}
    questions = []
    for one, other in itertools.permutations([name for name in place if name != middle]):
        x, y = (place[one][axis] - place[other][axis] for axis in (0, 1))
        for relation, step in SIDES.items():
            found = "yes" if x * step[0] + y * step[1] > 0 else "no"
            questions.append(Question(f"Is the {one} {relation} the {other}?", found, (0, 1)))
    told = tuple(f"The {one} is {relation} the {other}." for one, relation, other in facts)
    return Story(told, tuple(questions))


def _paths(rng: Generator) -> Story:
    """Rooms that touch only where a fact says so, so that there is one path between any two."""
    rooms = some(rng, ROOMS, between(rng, 4, len(ROOMS)))
    cells: dict[Step, str] = {(0, 0): rooms[0]}
    links: list[tuple[str, str, str]] = []
    for room in rooms[1:]:
        cell, parent, direction = pick(rng, _free(cells))
        cells[cell] = room
        links.append((room, direction, parent))
    links = some(rng, links, len(links))
    facts = [_told(rng, COMPASS, link) for link in links]
    told = tuple(f"The {one} is {direction} of the {other}." for one, direction, other in facts)
    return Story(told, tuple(_walks({room: cell for cell, room in cells.items()}, links)))


def _free(cells: dict[Step, str]) -> list[tuple[Step, str, str]]:
    """Empty cells with one neighbour: the cell, that neighbour, and the direction from it."""
    found: dict[Step, list[tuple[str, str]]] = {}
    for (x, y), room in cells.items():
        for direction, (dx, dy) in COMPASS.items():
            found.setdefault((x + dx, y + dy), []).append((room, direction))
    return [(cell, *ways[0]) for cell, ways in found.items() if cell not in cells and len(ways) == 1]


def _walks(place: dict[str, Step], links: list[tuple[str, str, str]]) -> list[Question]:
    """Every walk of two steps over two links."""
    steps = [(one, other, index) for index, (one, _, other) in enumerate(links)]
    steps += [(other, one, index) for one, other, index in steps]
    names = {step: name for name, step in COMPASS.items()}
    found = []
    for (start, middle, i), (again, end, j) in itertools.permutations(steps, 2):
        if middle == again and start != end:
            walk = ",".join(
                names[place[to][0] - place[by][0], place[to][1] - place[by][1]]
                for by, to in ((start, middle), (middle, end))
            )
            text = f"How do you go from the {start} to the {end}?"
            found.append(Question(text, walk, tuple(sorted((i, j)))))
    return found


TASKS = (
    Task(4, "two argument relations", ROOMS, _two_arguments),
    Task(17, "positional reasoning", ("yes", "no"), _positions),
    Task(19, "path finding", PATHS, _paths),
)
