"""The curves of a run, from whatever its records hold."""

from llip.training.reporting.figures import draw_curves


def test_records_with_missing_values_are_drawn(tmp_path):
    assert draw_curves(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2}\n{"step": 3, "loss": null}\n')
    evals = ['{"step": 1, "task": "a", "values": {"top1": 0.5}}', '{"step": 2, "task": "a", "values": {"top5": 0.5}}']
    evals += ['{"step": 2, "task": "b", "values": {}}', '{"step": 2}', '{"step": 2, "ta']
    (tmp_path / "evals.jsonl").write_text("\n".join(evals))
    figure = draw_curves(tmp_path)
    assert figure is not None
    assert figure.stat().st_size > 1000
