# %% [markdown]
# # Search a folder of pictures, and explain an answer
#
# Run it cell by cell in an editor that knows `# %%`, or as a whole, from the repository:
#
#     python examples/search_a_folder.py logs/llip_quickstart/checkpoints/latest.pt out
#
# The checkpoint is that of `python -m llip.main llip_quickstart` (minutes on a CPU). The pictures are scenes drawn on
# the spot; use a folder of your own instead, and a model that was trained on photographs.

# %%
import sys
from pathlib import Path

import numpy as np
import torch

import llip
from llip.clipeval.scorer import Scorer
from llip.open_clip.mixture_statistics import mixture_measures
from llip.scenes.render import render
from llip.scenes.world import sample_scene
from llip.tools.explain.explanation import explain
from llip.tools.explain.figure import draw
from llip.tools.explain.inputs import read_image
from llip.tools.search.build import build_index
from llip.tools.search.query import Searcher
from llip.tools.search.show import contact_sheet
from llip.tools.search.store import ModelSource, open_index

checkpoint = Path(sys.argv[1] if len(sys.argv) > 1 else "logs/llip_quickstart/checkpoints/latest.pt")
out = Path(sys.argv[2] if len(sys.argv) > 2 else "search_example")

# %% [markdown]
# ## A folder of pictures

# %%
pictures = out / "pictures"
pictures.mkdir(parents=True, exist_ok=True)
for number in range(60):
    rng = np.random.default_rng([7, number])
    render(sample_scene(rng), rng, image_size=96).save(pictures / f"scene_{number:03}.png")

# %% [markdown]
# ## The index
# Every picture goes through the image encoder once; its mixture tokens stay on disk. A second call reads only what is
# new or changed.

# %%
model = llip.load_pretrained(checkpoint)
scorer = Scorer(model, model.preprocess_val, model.tokenizer, torch.device("cpu"))
report = build_index(pictures, ModelSource.of(str(checkpoint), None), out / "index", scorer)
print(f"{report.indexed} pictures indexed, {len(report.damaged)} damaged")

# %% [markdown]
# ## A query
# The caption decides how each picture's tokens are mixed, so its score with a picture cannot be stored: candidates come
# from a score without the caption and are then scored exactly.

# %%
query = "a red star"
searcher = Searcher(open_index(out / "index"), scorer)
hits = searcher.search(query, top=10)
for hit in hits[:3]:
    print(f"{hit.score:.3f}  {hit.path.name}")
contact_sheet(query, hits, pictures, out / "sheet.png")

# %% [markdown]
# ## Why this picture?
# The weights over mixture tokens, and where the tokens look, for the best answer and three captions.

# %%
best = read_image(hits[0].path)
captions = [query, "a blue ring", "the background is pink"]
explanation = explain(model, [best], [hits[0].path.name], captions)
draw(explanation, [best], out / "explained.png", tokens=4)
print({caption: round(score, 3) for caption, score in zip(captions, explanation.scores[0].tolist(), strict=True)})

# %% [markdown]
# ## Do captions change the picture's feature at all?

# %%
paths = sorted(pictures.glob("*.png"))
images = torch.stack([model.preprocess_val(read_image(path)) for path in paths])
with torch.no_grad():
    h, t = model.encode_image(images), model.encode_text(model.tokenizer(captions))
for name, value in mixture_measures(model, h, t).items():
    print(f"{name:24} {value:.3f}")
