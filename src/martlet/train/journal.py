"""What a run leaves beside its weights: a line of logging.jsonl for each log, and curves as pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from martlet.train import layout

CURVES = ("loss", "rewards/accuracies", "rewards/margins", "learning_rate", "grad_norm", "mean_token_accuracy")


class Journal(TrainerCallback):
    """Writes logging.jsonl, and the arguments into each checkpoint."""

    def __init__(self, run: Path, arguments: Any, extra: Mapping[str, Any], step: int = 0):
        """step: the run goes on from here; what an earlier attempt logged behind it is dropped."""
        self.run, self.arguments, self.extra = run, arguments, extra
        self.file = run / layout.LOG
        self.began = time.monotonic()
        if self.file.exists():
            kept = [
                line for line in self.file.read_text("utf-8").splitlines() if json.loads(line).get("step", 0) <= step
            ]
            self.file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and logs:
            seconds = round(time.monotonic() - self.began, 2)
            line = {"step": state.global_step, "of": state.max_steps, "seconds": seconds, **logs}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            layout.write_args(self.run / f"checkpoint-{state.global_step}", self.arguments, self.extra)


def draw(run: Path) -> list[Path]:
    """images/NAME.png of every curve of which logging.jsonl has two points, training and evaluation together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    file = run / layout.LOG
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    drawn = []
    for name in CURVES:
        parts = {}
        for kind, key in (("training", name), ("validation", f"eval_{name}")):
            points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
            if points:
                parts[kind] = points
        if sum(map(len, parts.values())) < 2:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        for kind, points in parts.items():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, label=kind)
        axes.set(xlabel="step", ylabel=name, title=name)
        axes.grid(alpha=0.3)
        if len(parts) > 1:
            axes.legend()
        target = run / "images" / f"{name.replace('/', '_')}.png"
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)
        drawn.append(target)
    return drawn
