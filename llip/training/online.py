"""Zero-shot evaluation during training, through clipeval's one function."""

from collections.abc import Callable
from pathlib import Path

from llip.clipeval.online import evaluate_online, load_online_eval
from llip.configs import Config
from llip.open_clip.factory import get_tokenizer, image_transforms, model_spec
from llip.open_clip.model import Llip
from llip.training.distributed import Processes
from llip.training.run_log import RunLog, log
from llip.training.trainer import autocast_dtype


def online_evaluation(config: Config) -> Callable[[RunLog, Processes, Llip, int], None]:
    """Read the config's evaluation YAMLs and return what evaluates a model by them and records the results.

    Every process must call it: each works on its share of the images.

    Raises:
        UserError: a YAML or a catalog is missing or wrong.
    """
    online = [load_online_eval(Path(path)) for path in config.evals]
    spec = model_spec(config)
    _, preprocess = image_transforms(spec.image_size)
    tokenizer = get_tokenizer(context_length=spec.context_length)
    dtype = autocast_dtype(config.precision)

    def evaluate(run_log: RunLog, processes: Processes, model: Llip, step: int) -> None:
        for one in online:
            for result in evaluate_online(model, preprocess, tokenizer, one, processes.device, dtype):
                if result.error:
                    log.warning("step %d, %s: %s", step, result.task, result.error)
                    continue
                log.info("step %d, %s: %s %.1f %%", step, result.task, result.metric, 100 * result.value)
                run_log.evaluation(step, result.task, {"value": result.value, **result.values}, metric=result.metric)

    return evaluate
