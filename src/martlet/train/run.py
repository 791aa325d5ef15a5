"""A training run from its arguments to its last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from martlet import chat, hub
from martlet.chat.template import Template
from martlet.errors import MartletError, UsageError
from martlet.hub.card import ModelCard
from martlet.hub.tokenizer import Tokenizer
from martlet.train import checks, console, layout
from martlet.train.arguments import RlhfArguments, SftArguments
from martlet.train.encode import Encoded, Lengths, show
from martlet.train.split import split_rows

log = logging.getLogger("martlet")

SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to; names as SWIFT's sft_main returns them."""

    output_dir: str
    last_model_checkpoint: str | None
    best_model_checkpoint: str | None
    best_metric: float | None
    global_step: int
    train_time: float
    log_history: list[dict[str, Any]]


@dataclass(slots=True)
class Prepared:
    """Rows as the model sees them. train, held: Encoded, or what a preference trainer takes. left_out: why, each."""

    train: list[Any]
    held: list[Any]
    left_out: list[str]


@dataclass(slots=True)
class Networks:
    """model: what is trained. adapter: a LoraConfig to put on it. reference: what preferences are measured against,
    where all weights are trained; otherwise that is the model without its adapter."""

    model: Any
    adapter: Any = None
    reference: Any = None


def train(arguments: SftArguments, run: Path | None = None) -> Result | None:
    """Run it. None with --check, which only looks at the data. run: the folder, when it has been made already.

    Raises UsageError and its kin for whatever is wrong before the first step, naming the flag.
    """
    arguments = restored(arguments)
    if arguments.check:  # looks at the data, which needs none of the libraries that training would
        checks.refuse_values(arguments)
    else:
        checks.refuse(arguments)
        checks.refuse_names(arguments)
    card, tokenizer, template = _model_text(arguments)
    prepared = prepare(arguments, template, tokenizer, say=_say)
    if arguments.check:
        return None

    import transformers

    console.quiet()
    transformers.set_seed(arguments.seed)
    networks = _networks(card, arguments)
    if arguments.push_to_hub:
        checks.reach_hub(arguments)
    resumed, run = place(arguments) if run is None else (_resumed(arguments), run)
    with contextlib.nullcontext() if resumed else layout.gone_when_nothing_came_of_it(run):
        trainer, seconds = _train_into(run, resumed, arguments, card, tokenizer, prepared, networks)
    state, last = trainer.state, layout.checkpoints(run)
    return Result(
        output_dir=str(run),
        last_model_checkpoint=str(last[-1]) if last else None,
        best_model_checkpoint=state.best_model_checkpoint,
        best_metric=state.best_metric,
        global_step=state.global_step,
        train_time=seconds,
        log_history=state.log_history,
    )


def _networks(card: ModelCard, arguments: SftArguments) -> Networks:
    """Raises UsageError for modules, parameters and adapters that are not there."""
    from martlet.train import model as models

    network = models.load(card, arguments)
    adapter, reference = None, None
    begins_with = arguments.adapter
    if arguments.resume_from_checkpoint and arguments.resume_only_model and arguments.sft_type == "lora":
        begins_with = str(layout.find_checkpoint(Path(arguments.resume_from_checkpoint)))
    if begins_with:
        network = models.continue_adapter(network, begins_with)
    elif arguments.sft_type == "lora":
        adapter = models.adapter_config(network, card, arguments)
    else:
        models.freeze(network, arguments)
        if isinstance(arguments, RlhfArguments) and arguments.rlhf_type in ("dpo", "kto"):
            reference = models.load(_reference(arguments) or card, arguments).eval()
    return Networks(network, adapter, reference)


def _train_into(
    run: Path,
    resumed: Path | None,
    arguments: SftArguments,
    card: ModelCard,
    tokenizer: Tokenizer,
    prepared: Prepared,
    networks: Networks,
) -> tuple[Any, float]:
    """(the trainer, after its work; seconds). resumed: the checkpoint to go on from. The last step is a checkpoint."""
    from martlet.train import journal
    from martlet.train import model as models
    from martlet.train.trainers import trainer_for

    extra = {"model_type": arguments.model_type or card.model_type, "base": models.base_name(card), "run": str(run)}
    extra["template_type"] = arguments.template_type or card.template
    main = int(os.environ.get("RANK", 0)) == 0
    step = int(resumed.name.rpartition("-")[2]) if resumed else 0
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(
        Path(arguments.logging_dir).expanduser() if arguments.logging_dir else run / "runs"
    )
    try:
        if main:
            for name in layout.remove_incomplete(run) if resumed else ():
                log.warning("removed %s, whose writing was cut off", name)
            layout.write_args(run, arguments, extra)
        trainer = trainer_for(
            arguments,
            networks.model,
            models.tokenizer_for_trainer(tokenizer),
            prepared.train,
            prepared.held,
            adapter=networks.adapter,
            reference=networks.reference,
            output_dir=str(run),
            callbacks=[journal.Journal(run, arguments, extra, step)] if main else [],
        )
        log.info("training %s of %s into %s", _count(trainer.model), card.name, run)
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resumed) if step else None)
        if main and arguments.save_strategy != "no" and not (run / f"checkpoint-{trainer.state.global_step}").exists():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    except KeyboardInterrupt:
        if main:
            layout.remove_incomplete(run)
            if whole := layout.checkpoints(run):
                log.info("stopped; --resume_from_checkpoint %s goes on after %s", run, whole[-1].name)
        raise
    except Exception as error:
        console.end_bars()
        why = layout.no_room(error, run)
        removed = layout.remove_incomplete(run) if main else []
        if why:
            whole = layout.checkpoints(run)
            raise MartletError(
                f"{why}; "
                + (f"{', '.join(removed)} could not be written and is removed, " if removed else "")
                + (f"the last complete one is {whole[-1]}" if whole else "no checkpoint is complete"),
                param="output_dir",
            ) from error
        raise
    finally:
        if main:
            _draw(run)
    return trainer, round(time.monotonic() - began, 2)


def prepare(
    arguments: SftArguments, template: Template | None, tokenizer: Tokenizer, *, say: Callable[[str], None] = print
) -> Prepared:
    """Read, split and encode the datasets; say what was left out and how long rows are, and show one."""
    if not arguments.dataset and not arguments.self_cognition_sample:
        raise UsageError("there is nothing to train on: --dataset NAME or PATH", param="dataset")
    rows = split_rows(arguments, template, tokenizer)
    train_set, held_set, left_out = [x for _, x in rows.train], [x for _, x in rows.held], rows.left_out
    if left_out:
        say(f"{len(left_out)} rows are left out:")
        for line in left_out[:SHOWN_PROBLEMS]:
            say(f"  {line}")
        if len(left_out) > SHOWN_PROBLEMS:
            say(f"  ... and {len(left_out) - SHOWN_PROBLEMS} more")
    lengths = Lengths.of([whole for row in train_set for whole in _wholes(row)])
    say(
        f"{len(train_set)} rows to train on, {len(held_set)} to evaluate on; tokens a sequence: least {lengths.least}, "
        f"median {lengths.median}, 95 % {lengths.p95}, most {lengths.most}; {lengths.total} in all"
    )
    say("the first row, [[what is learned]] in brackets:")
    for whole in _wholes(train_set[0]):
        say(show(whole, tokenizer))
    return Prepared(train_set, held_set, left_out)


def _wholes(row: Any) -> list[Encoded]:
    """The sequences of an encoded row of any trainer."""
    if isinstance(row, Encoded):
        return [row]
    prompt, *endings = row
    return [Encoded(prompt + e, [0] * len(prompt) + [1] * len(e)) for e in endings if isinstance(e, list)]


def _card(arguments: SftArguments) -> ModelCard:
    name = arguments.model or arguments.model_id_or_path
    if arguments.resume_only_model and arguments.resume_from_checkpoint and arguments.sft_type == "full":
        name = str(layout.find_checkpoint(Path(arguments.resume_from_checkpoint)))
    if not (name or arguments.model_type):
        raise UsageError("which model is to be trained? --model NAME, or --model_type KEY", param="model")
    kind = arguments.model_type if name else None
    return hub.resolve(name or arguments.model_type, model_type=kind, revision=arguments.model_revision)


def _reference(arguments: RlhfArguments) -> ModelCard | None:
    name = arguments.ref_model_id_or_path or arguments.ref_model_type
    return hub.resolve(name) if name else None


def _template(card: ModelCard, tokenizer: Tokenizer, arguments: SftArguments) -> Template | None:
    name = arguments.template_type
    name = None if name is None or name.upper() == "AUTO" else name
    if name or card.template or tokenizer.chat_template:
        return chat.template_for(card, tokenizer, name)
    return None


def _resumed(arguments: SftArguments) -> Path | None:
    """The checkpoint to go on from as if never stopped."""
    if not arguments.resume_from_checkpoint or arguments.resume_only_model:
        return None
    return layout.find_checkpoint(Path(arguments.resume_from_checkpoint))


def place(arguments: SftArguments) -> tuple[Path | None, Path]:
    """(the checkpoint to go on from, the run's folder): going on stays in the run that was stopped."""
    checkpoint = _resumed(arguments)
    if checkpoint:
        return checkpoint, checkpoint.parent
    card = _card(arguments)
    name = arguments.model_type or card.model_type or card.name
    return None, layout.new_run(Path(arguments.output_dir), name, suffix=arguments.add_output_dir_suffix)


def restored(arguments: SftArguments) -> SftArguments:
    """When a run goes on: its own arguments, under those that are given now."""
    checkpoint = _resumed(arguments)
    saved = layout.read_args(checkpoint) if checkpoint else {}
    changes = {}
    for item in fields(arguments):
        if item.name in saved and getattr(arguments, item.name) == item.default:
            value = saved[item.name]
            changes[item.name] = tuple(value) if isinstance(value, list) else value
    if saved and not (arguments.model or arguments.model_type or arguments.model_id_or_path):
        changes |= {"model": saved.get("base"), "model_id_or_path": None}
    return replace(arguments, **{**changes, "check": arguments.check})


def prepare_only(arguments: SftArguments) -> None:
    """--check: look at the data and go no further."""
    _, tokenizer, template = _model_text(arguments)
    prepare(arguments, template, tokenizer, say=_say)


def _model_text(arguments: SftArguments) -> tuple[ModelCard, Tokenizer, Template | None]:
    card = _card(arguments)
    tokenizer = hub.load_tokenizer(card)
    return card, tokenizer, _template(card, tokenizer, arguments)


def _draw(run: Path) -> None:
    """Curves are no reason to lose a run."""
    from martlet.train import journal

    try:
        journal.draw(run)
    except OSError as error:
        log.warning("the curves of %s could not be drawn: %s", run, error)


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


def _count(model: Any) -> str:
    """How many parameters are trained, of how many."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    learned, every = sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
    return f"{learned / 1e6:.2f} M of {every / 1e6:.1f} M parameters"


def as_dict(result: Result | None) -> dict[str, Any]:
    """SWIFT's return value of sft_main."""
    return {} if result is None else asdict(result)
