"""Which text is whose, against owners written out text by text."""

import pytest
import torch

from llip.open_clip.objectives.matches import Matches

LAYOUTS = [(3, 1, 0, 1), (3, 2, 0, 1), (2, 3, 2, 3), (4, 1, 4, 3)]  # images, captions, offset, processes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positives_are_the_pairs_of_image_and_own_text(layout):
    images, captions, offset, processes = layout
    matches = Matches(images, processes * images * captions, captions, offset)
    owners = [image for image in range(processes * images) for _ in range(captions)]
    assert matches.owners().tolist() == owners
    scores = torch.arange(images * len(owners)).view(images, -1)
    for image in range(images):
        own = [scores[image, text].item() for text, owner in enumerate(owners) if owner == offset + image]
        assert matches.positives(scores)[:, image].tolist() == own
    texts = torch.arange(len(owners))
    assert matches.local(texts).T.flatten().tolist() == [j for j in texts if offset <= owners[j] < offset + images]
    matches.positives(scores).fill_(-1)  # a view: written through
    assert (scores == -1).nonzero().tolist() == [
        [image, j] for image in range(images) for j in texts if owners[j] == offset + image
    ]


def test_masked_texts_do_not_count():
    mask = torch.tensor([True, True, True, False, True, False, True, False])
    matches = Matches(2, 8, 2, 2, mask)
    values = torch.zeros(8)
    assert matches.local_mask(values).tolist() == [[1, 1], [0, 0]]
    assert matches.texts_per_process(values).item() == 2.5  # five texts on two processes
    assert matches.hide(values, 3.0).tolist() == [0, 0, 0, 3, 0, 3, 0, 3]
    plain = Matches(2, 8, 2, 2)
    assert plain.texts_per_process(values).item() == 4
    assert plain.local_mask(values).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("images", "texts", "captions", "offset"), [(2, 4, 1, 3), (2, 4, 3, 0), (2, 5, 2, 0)])
def test_texts_must_suffice(images, texts, captions, offset):
    with pytest.raises(AssertionError, match=f"{images} images with {captions} texts each at offset {offset}"):
        Matches(images, texts, captions, offset)
