"""What a demonstration shows: the contenders, the text, the lengths, and how its time is divided."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atma.config import Recipe, from_dict
from atma.eval.language_model import OwnModel
from atma.eval.rope import Stretch, Stretched
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
    stretch: Literal["linear", "yarn"] | None = None
    """How its rotary positions are stretched over longer texts. Such a one is another's weights, and is not trained."""


CONTENDERS = (
    Contender("nano", "ATMA"),
    Contender(
        "nano-rope-canon",
        "RoPE control",
        "It is ATMA with rotary softmax attention in place of Polar attention and memory; all else is the same, the "
        "short convolutions over queries, keys and values (Canon) included.",
    ),
    Contender(
        "nano-rope-canon",
        "RoPE control, YaRN",
        "These are the weights of the control, untuned; at every length its rotary positions are stretched by as much "
        "as the text is longer than the training texts (YaRN, arXiv 2309.00071).",
        "yarn",
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
        name = loaded.name if Path(contender.packaged).exists() else contender.packaged
        name += {None: "", "linear": " interpolated", "yarn": " with YaRN"}[contender.stretch]
        return Packaged(contender, name, loaded, from_dict(Recipe, recipe))

    def reader(self) -> OwnModel:
        """The model as it reads texts of any length."""
        if self.contender.stretch is None:
            return OwnModel(self.loaded)
        return Stretched(self.loaded, Stretch(self.contender.stretch, self.recipe.train.length))
