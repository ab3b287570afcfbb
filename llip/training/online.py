"""Zero-shot evaluation during training, through clipeval's one function."""

from collections.abc import Callable

from llip.clipeval.online import evaluate_online, load_online_eval
from llip.configs import Config
from llip.open_clip.factory import get_tokenizer, image_transforms, model_spec
from llip.open_clip.model import Llip, autocast_dtype
from llip.training.distributed import Processes
from llip.training.run_log import RunLog, log


def online_evaluation(config: Config, run_log: RunLog, processes: Processes) -> Callable[[Llip, int], None] | None:
    """Return what evaluates a model by the config's evaluation YAMLs and records the results; None when it is off.

    Every process must call it: each works on its share of the images.

    Raises:
        UserError: a YAML or a catalog is missing or wrong.
    """
    if not config.eval_steps or not config.evals:
        return None
    online = [load_online_eval(path) for path in config.evals]
    spec = model_spec(config)
    _, preprocess = image_transforms(spec.image_size)
    tokenizer = get_tokenizer(context_length=spec.context_length)
    dtype = autocast_dtype(config.precision)

    def evaluate(model: Llip, step: int) -> None:
        for one in online:
            for result in evaluate_online(model, preprocess, tokenizer, one, processes.device, dtype):
                if result.error:
                    log.warning("step %d, %s: %s", step, result.task, result.error)
                    continue
                words = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.values.items())
                log.info("step %d, %s: %s", step, result.task, words)
                run_log.evaluation(step, result.task, result.values)

    return evaluate
