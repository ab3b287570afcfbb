"""The evaluation sets: what each one asks of its scenes, its classes and its prompts."""

from dataclasses import dataclass

from llip.scenes.world import BACKGROUNDS, KINDS, PLACES, SHAPES, Demand

RETRIEVAL_TASK = "scenes_retrieval"


@dataclass(frozen=True)
class ClassificationTask:
    """A zero-shot classification set. Scenes of class i meet `demands[i]`; `{c}` in a template is the class's name."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    demands: tuple[Demand, ...]


CLASSIFICATION_TASKS = (
    ClassificationTask(
        "scenes_top_left",
        classes=tuple(f"{color} {shape}" for shape, color in KINDS),
        templates=(
            "a {c} in the top left",
            "in the top left, a {c}",
            "there is a {c} in the top left",
            "the top left shows a {c}",
            "top left: {c}",
        ),
        demands=tuple(Demand(kind=kind, cell=PLACES.index("top left")) for kind in KINDS),
    ),
    ClassificationTask(
        "scenes_red_shape",
        classes=SHAPES,
        templates=("a red {c}", "there is a red {c}", "a picture with a red {c}", "one of the shapes is a red {c}"),
        demands=tuple(Demand(kind=(shape, "red"), only_of_its_color=True) for shape in SHAPES),
    ),
    ClassificationTask(
        "scenes_background",
        classes=tuple(BACKGROUNDS),
        templates=(
            "shapes on a {c} background",
            "a {c} background",
            "a picture with a {c} background",
            "the background is {c}",
        ),
        demands=tuple(Demand(background=color) for color in BACKGROUNDS),
    ),
)
