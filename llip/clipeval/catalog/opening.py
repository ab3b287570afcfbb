"""From a catalog's entry to its images and class names, with everything checked that needs no image to be decoded."""

from collections.abc import Sequence
from typing import Any

from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.datasets import ImageSource
from llip.clipeval.texts.labels import Labels, resolve_labels
from llip.errors import UserError


def open_source(entry: Entry) -> ImageSource:
    """Open the dataset of an entry.

    Raises:
        UserError: it is missing (the message says where it comes from), damaged, empty, or has another number of
            images than the entry expects.
    """
    try:
        source = entry.data.open()
    except UserError as error:
        if entry.data.exists():
            raise
        raise UserError(f"{error}{how_to_get(entry)}") from error
    check_size(entry, source)
    return source


def check_size(entry: Entry, source: ImageSource) -> None:
    """Raise a `UserError` for an empty dataset, or one with another number of images than the entry expects."""
    if len(source) == 0:
        raise UserError(f"the dataset is empty: no image in {_where(entry)}")
    if entry.num_images is not None and len(source) != entry.num_images:
        expected = f"the entry expects num_images = {entry.num_images}"
        raise UserError(f"{len(source)} images in {_where(entry)}, but {expected}")


def _where(entry: Entry) -> str:
    split = getattr(entry.data, "split", "")
    return f"{entry.data.location()}" + (f", split {split}" if split else "")


def how_to_get(entry: Entry) -> str:
    """Return the end of a sentence about where to get a missing dataset; empty if the entry does not say."""
    source = f"; it comes from {entry.source}" if entry.source else ""
    return source + (f"; get it with `{entry.download}`" if entry.download else "")


def labels_of(entry: Entry, source: ImageSource) -> Labels:
    """Read the class names and prompts of an entry and match them with the dataset's; see `resolve_labels`."""
    if entry.label_names and source.classnames:
        raise UserError("label_names is for datasets without class names, and this one has them; remove it")
    names = entry.label_names or source.classnames
    return resolve_labels(entry.classnames, entry.prompts, names, source.templates, entry.num_classes, entry.class_keys)


def check_targets(source: ImageSource, labels: Labels) -> None:
    """Raise a `UserError` for the first image whose label has no class name, where labels are known without images."""
    targets = source.targets()
    if targets is not None:
        check_batch(range(len(targets)), targets, source, labels)


def check_batch(indices: Sequence[int], targets: Sequence[Any], source: ImageSource, labels: Labels) -> None:
    """Raise a `UserError` for the first of these images whose label has no class name."""
    classes = len(labels.classnames)
    for index, target in zip(indices, targets, strict=True):
        for label in target if isinstance(target, tuple) else (target,):
            if not 0 <= label < classes:
                raise UserError(f"image {source.name(index)} has label {label}, but there are {classes} class names")
