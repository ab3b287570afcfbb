"""Zero-shot evaluation: a catalog of datasets, class names and prompts, exact scores over every process.

`evaluate.evaluate_tasks` is the one function that programs (`evals/`) and training call.
"""
