"""One call of `martlet export`, from its arguments to the path of what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from martlet.errors import UsageError
from martlet.export import merge as merging
from martlet.export.arguments import ExportArguments
from martlet.export.source import Source, find
from martlet.flag import refuse_strays

Progress = Callable[[int, int], None]


def export(arguments: ExportArguments, progress: Progress | None = None) -> Path:
    """Do what is asked and return where the last result lies. Raises UsageError when nothing is.

    progress(done, total) counts the layers that are quantised.
    """
    result = arguments.to_peft_format or arguments.to or arguments.merge_lora or arguments.quant_bits
    if not (result or arguments.push_to_hub):
        raise UsageError("nothing to do: --merge_lora, --quant_bits 4, --to_peft_format, --to gguf or --push_to_hub")
    if arguments.quant_bits and (arguments.to or arguments.to_peft_format):
        raise UsageError("--quant_bits goes with neither --to nor --to_peft_format", param="quant_bits")
    if sum((arguments.to_peft_format, arguments.to is not None or arguments.merge_lora)) > 1:
        raise UsageError("--to_peft_format goes with no other result; ask for one at a time", param="to_peft_format")
    if arguments.verify and not (arguments.merge_lora or arguments.to or arguments.quant_bits):
        raise UsageError(
            "--verify compares what --merge_lora, --quant_bits or --to writes; ask for one", param="verify"
        )
    if arguments.push_to_hub and not arguments.hub_model_id:
        raise UsageError("--push_to_hub needs --hub_model_id NAMESPACE/NAME", param="hub_model_id")
    _refuse(arguments)
    source = find(arguments)
    result = _write(source, arguments, progress)
    if arguments.push_to_hub:
        from martlet.export.push import push

        push(result, arguments)
    return result


QUANTISING = ("quant_method", "quant_group_size", "quant_act_order", "quant_device_map", "quant_output_dir")
CALIBRATING = ("dataset", "dataset_seed", "quant_n_samples", "quant_seqlen")
HUB = ("hub_model_id", "hub", "hub_token", "hub_private_repo", "commit_message")


def _refuse(arguments: ExportArguments) -> None:
    """Flags that nothing here would look at, and numbers that cannot be. Raises UsageError."""
    quantises, method = arguments.quant_bits != 0, arguments.quant_method
    writes = arguments.to_peft_format or arguments.to or arguments.merge_lora or quantises
    refuse_strays(
        arguments,
        (
            (("gguf_type",), arguments.to == "gguf", "--to gguf"),
            (QUANTISING, quantises, "--quant_bits"),
            (("quant_act_order",), method == "gptq", "--quant_method gptq"),
            (CALIBRATING, quantises and method != "rtn", "--quant_bits by gptq or awq"),
            (("dtype",), arguments.merge_lora or quantises, "--merge_lora and --quant_bits"),
            (("output", "replace_if_exists"), writes, "a result that is written"),
            (HUB, arguments.push_to_hub, "--push_to_hub"),
        ),
    )
    for name in ("quant_n_samples", "quant_seqlen"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}", param=name)


def _write(source: Source, arguments: ExportArguments, progress: Progress | None) -> Path:
    replace, output = arguments.replace_if_exists, arguments.output and Path(arguments.output).expanduser()
    converts = arguments.to is not None or arguments.quant_bits != 0
    if arguments.to_peft_format:
        return merging.to_peft(source, output or _named(source, "peft"), replace=replace)
    if arguments.merge_lora:
        target = _named(source, "merged") if converts else output or _named(source, "merged")
        merged = merging.merge(source, target, dtype=arguments.dtype, replace=replace)
        if arguments.verify and not converts:
            from martlet.export.verify import check_merged

            check_merged(source, merged)
        if not converts:
            return merged
    if arguments.to == "gguf":
        from martlet.export.gguf import write

        target = output or source.place.with_name(f"{source.place.name}-{arguments.gguf_type}.gguf")
        result = write(source, target, arguments.gguf_type, replace=replace)
    elif arguments.quant_bits:
        from martlet.export.quantise.model import write as quantise

        name = f"{arguments.quant_method}-int{arguments.quant_bits}"
        given = output or (arguments.quant_output_dir and Path(arguments.quant_output_dir).expanduser())
        result = quantise(source, given or _named(source, name), arguments, progress)
    else:
        return source.adapter or source.card.path
    if arguments.verify:
        from martlet.export.verify import compare

        compare(source, result)
    return result


def _named(source: Source, suffix: str) -> Path:
    return source.place.with_name(f"{source.place.name}-{suffix}")
