"""What a user sees of the libraries below: the bar of the training and what it logs, and no bars of small things."""

from __future__ import annotations

import importlib.util
import warnings


def quiet() -> None:
    """For the whole process, so only a run of a command calls it. Errors are still raised."""
    from transformers.utils import logging as theirs

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)\b")
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()


def end_bars() -> None:
    """An exception leaves the bar of a training open: it would be drawn once more, over what is said of the error."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
