"""What a demonstration shows: the contenders, the text, the lengths, and how its time is divided."""

from dataclasses import dataclass
from pathlib import Path

from atma.config import Recipe, from_dict
from atma.loading import Loaded, load


@dataclass(frozen=True)
class Contender:
    """One kind of model: a packaged one, and one made here by the same recipe. The first of a list is ours."""

    packaged: str
    """A packaged name or a model folder."""
    name: str
    """What the model trained here is called."""
    caveat: str = ""
    """What a reader must know before comparing, a sentence."""


CONTENDERS = (
    Contender("nano", "ATMA"),
    Contender(
        "nano-rope",
        "RoPE control",
        "It is ATMA's backbone with rotary attention, without memory and without Canon (a short convolution over the "
        "keys); without Canon a model this small hardly learns to copy, so it is behind at every length.",
    ),
)


@dataclass(frozen=True)
class Plan:
    """Shares are of the time that is left when a stage begins; what a stage does not use is left to the next."""

    contenders: tuple[Contender, ...] = CONTENDERS
    source: str = "stdlib"
    """What the models trained here learn, and both kinds are measured on."""
    vocab_size: int = 1024
    doublings: int = 6
    """The greatest length is the training length doubled this often: 6 is 64×."""
    most_steps: int = 100_000
    sizes: tuple[int, int] = (4, 64)
    """The fewest documents to plan for, and the most documents, needles and questions."""
    recall_share: float = 0.14
    training_share: float = 0.5
    trained_share: float = 0.36
    packaged_share: float = 0.9
    """The rest is for writing the report."""

    def __post_init__(self) -> None:
        if not self.contenders:
            raise ValueError("'contenders' must name a model at least, not ()")

    def lengths(self, trained: int) -> list[int]:
        """The training length and its doublings."""
        return [trained * 2**i for i in range(self.doublings + 1)]


@dataclass(frozen=True)
class Packaged:
    """A packaged model with the recipe that made it."""

    contender: Contender
    name: str
    loaded: Loaded
    recipe: Recipe

    @staticmethod
    def open(contender: Contender) -> "Packaged":
        """ValueError if there is no such model, or its config.json tells no recipe."""
        loaded = load(contender.packaged)
        recipe = loaded.info.get("extra", {}).get("recipe")
        if recipe is None:
            raise ValueError(f"{loaded.path}: its config.json holds no recipe; save it with `atma train`")
        name = loaded.path.name if Path(contender.packaged).exists() else contender.packaged
        return Packaged(contender, name, loaded, from_dict(Recipe, recipe))
