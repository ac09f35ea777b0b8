"""An independent reader of stories: it parses sentences, remembers what they say, and answers questions. It shares no
code with the worlds, whose sentences it knows only as English."""

import re
from collections import Counter

GO = r"(?:went|moved|travelled|journeyed) to|is in"
TAKE = "took|picked up|grabbed|got"
DROP = "dropped|put down|left|discarded"
HAND = "gave|handed|passed"
NUMBERS = ["none", "one", "two", "three"]
CLOCK = ["Yesterday", "This morning", "This afternoon", "This evening"]
WAYS = {"north": 1j, "south": -1j, "east": 1, "west": -1}
SIDES = {"above": 1j, "below": -1j, "to the right of": 1, "to the left of": -1}
ONE_OF = {"mice": "mouse", "sheep": "sheep", "wolves": "wolf", "cats": "cat"}


class Reader:
    """Reads facts in order; `answer` then says what follows, or None."""

    def __init__(self, facts):
        self.place, self.maybe, self.not_in = {}, {}, {}
        self.owner, self.path, self.lying = {}, {}, {}
        self.gifts, self.visits, self.last = [], [], []
        self.kind, self.trait, self.fear, self.bigger, self.feels = {}, {}, {}, set(), {}
        self.near = {}
        for fact in facts:
            self.read(fact)

    def read(self, fact):
        text = fact.removesuffix(".")
        if found := re.fullmatch(rf"({'|'.join(CLOCK)}) (\w+) (?:{GO}) the (\w+)", text):
            self.visits.append((found[2], CLOCK.index(found[1]), found[3]))
            return
        text = re.sub("^(Then|Afterwards|After that|Following that) ", "", text)
        for pattern, meaning in (
            (rf"(\w+)(?: and (\w+))? (?:{GO}) the (\w+)", self.go),
            (rf"(\w+) (?:{TAKE}) the (\w+)", self.take),
            (rf"(\w+) (?:{DROP}) the (\w+)", self.drop),
            (rf"(\w+) (?:{HAND}) the (\w+) to (\w+)", self.give),
            (r"(\w+) is (?:no longer|not) in the (\w+)", self.leave),
            (r"(\w+) is either in the (\w+) or the (\w+)", self.doubt),
            (r"(\w+) is an? (\w+)", lambda who, what: self.kind.update({who: what})),
            (r"(\w+) are afraid of (\w+)", lambda a, b: self.fear.update({ONE_OF[a.lower()]: ONE_OF[b]})),
            (r"The (\w+) is bigger than the (\w+)", lambda a, b: self.bigger.add((a, b))),
            (r"The (\w+) fits inside the (\w+)", lambda a, b: self.bigger.add((b, a))),
            (rf"The (\w+) is ({'|'.join(WAYS)}) of the (\w+)", self.lie),
            (rf"The ([\w ]+?) is ({'|'.join(SIDES)}) the ([\w ]+)", self.lie),
            (r"(\w+) is (\w+)", lambda who, what: self.trait.update({who: what})),
        ):
            if found := re.fullmatch(pattern, text):
                meaning(*found.groups())
                return
        raise AssertionError(f"unreadable: {fact}")

    def go(self, one, other, place):
        group = self.last if one in ("she", "he", "They", "they") else [name for name in (one, other) if name]
        self.last = group
        for name in group:
            self.place[name] = place
            self.maybe.pop(name, None)
            self.not_in.pop(name, None)
            for thing, owner in self.owner.items():
                if owner == name:
                    self.path.setdefault(thing, []).append(place)

    def take(self, who, thing):
        self.owner.pop(thing, None)
        self.owner[thing] = who
        here = self.place.get(who)
        if here and self.path.get(thing, [""])[-1] != here:
            self.path.setdefault(thing, []).append(here)

    def drop(self, who, thing):
        self.owner.pop(thing, None)
        self.lying[thing] = self.place.get(who)

    def give(self, giver, thing, receiver):
        self.gifts.append((giver, thing, receiver))

    def leave(self, who, place):
        self.place.pop(who, None)
        self.not_in[who] = place

    def doubt(self, who, one, other):
        self.place.pop(who, None)
        self.maybe[who] = (one, other)

    def lie(self, one, relation, other):
        for name in {one, other}:
            alike = [known for known in {*self.near, one, other} - {name} if known in name or name in known]
            assert not alike, f"'{name}' may be '{alike[0]}'"
        self.near.setdefault(other, {})[one] = (WAYS | SIDES)[relation]
        self.near.setdefault(one, {})[other] = -(WAYS | SIDES)[relation]

    def answer(self, question):
        for pattern, rule in (
            (r"Where is (?:the )?(\w+)\?", self.whereabouts),
            (r"Where was the (\w+) before the (\w+)\?", lambda thing, place: before(self.path[thing], place)),
            (r"Where was (\w+) before the (\w+)\?", self.earlier),
            (r"Is (\w+) in the (\w+)\?", self.is_in),
            (r"How many objects is (\w+) carrying\?", lambda who: NUMBERS[len(self.carried(who))]),
            (r"What is (\w+) carrying\?", lambda who: ",".join(self.carried(who)) or "nothing"),
            (r"Who gave the (\w+)(?: to (\w+))?\?", lambda x, b: self.gift(0, None, x, b)),
            (r"What did (\w+) give to (\w+)\?", lambda a, b: self.gift(1, a, None, b)),
            (r"Who did (\w+) give the (\w+) to\?", lambda a, x: self.gift(2, a, x, None)),
            (r"Who received the (\w+)\?", lambda x: self.gift(2, None, x, None)),
            (r"What is (\w+) afraid of\?", lambda who: self.fear.get(self.kind.get(who))),
            (r"What color is (\w+)\?", self.colour),
            (r"Is the (\w+) bigger than the (\w+)\?", lambda a, b: self.is_bigger(a, b)),
            (r"Does the (\w+) fit in the (\w+)\?", lambda a, b: self.is_bigger(b, a)),
            (r"What is (\w+) of the (\w+)\?", lambda way, b: self.beyond(b, WAYS[way])),
            (r"What is the (\w+) (\w+) of\?", lambda a, way: self.beyond(a, -WAYS[way])),
            (rf"Is the ([\w ]+?) ({'|'.join(SIDES)}) the ([\w ]+)\?", self.is_beside),
            (r"How do you go from the (\w+) to the (\w+)\?", self.walk),
            (r"Where will (\w+) go\?", lambda who: MOTIVES[self.trait[who]]),
            (r"Why did (\w+) (?:go to|get) the \w+\?", lambda who: self.trait.get(who)),
        ):
            if found := re.fullmatch(pattern, question):
                return rule(*found.groups())
        raise AssertionError(f"unreadable: {question}")

    def whereabouts(self, what):
        if what in self.owner:
            return self.place.get(self.owner[what])
        return self.lying.get(what) or self.place.get(what)

    def earlier(self, who, place):
        return before([where for name, _, where in sorted(self.visits, key=lambda v: v[1]) if name == who], place)

    def is_in(self, who, place):
        if who in self.maybe:
            return "maybe" if place in self.maybe[who] else "no"
        if who in self.place:
            return "yes" if self.place[who] == place else "no"
        return "no" if self.not_in.get(who) == place else None

    def carried(self, who):
        return [thing for thing, owner in self.owner.items() if owner == who]

    def gift(self, wanted, *known):
        fitting = [g for g in self.gifts if all(k in (None, part) for k, part in zip(known, g, strict=True))]
        return fitting[0][wanted] if len(fitting) == 1 else None

    def colour(self, who):
        seen = Counter(
            self.trait[other] for other, kind in self.kind.items() if kind == self.kind[who] and other != who
        )
        return next(iter(seen)) if len(seen) == 1 else None

    def is_bigger(self, one, other):
        if self.reaches(one, other):
            return "yes"
        return "no" if self.reaches(other, one) else None

    def reaches(self, one, other):
        return (one, other) in self.bigger or any(self.reaches(b, other) for a, b in self.bigger if a == one)

    def beyond(self, name, way):
        """The one thing that lies that way, however far: by steps that all go that way."""
        found = [other for other, step in self.near.get(name, {}).items() if step == way]
        further = [self.beyond(other, way) for other in found]
        return found[0] if len(found) == 1 and further == [None] else None

    def grid(self, name):
        at, waiting = {name: 0j}, [name]
        while waiting:
            here = waiting.pop()
            for other, step in self.near.get(here, {}).items():
                if other not in at:
                    at[other] = at[here] + step
                    waiting.append(other)
        return at

    def is_beside(self, one, relation, other):
        return "yes" if (self.grid(other)[one] * SIDES[relation].conjugate()).real > 0 else "no"

    def walk(self, start, end):
        at = self.grid(start)
        found = [
            f"{name},{other}"
            for name, one in WAYS.items()
            for other, two in WAYS.items()
            if at.get(end) == one + two and one in at.values()
        ]
        return found[0] if len(found) == 1 else None


MOTIVES = {"hungry": "kitchen", "thirsty": "kitchen", "bored": "garden", "tired": "bedroom"}


def before(places, place):
    return places[places.index(place) - 1] if places.count(place) == 1 and places.index(place) else None
