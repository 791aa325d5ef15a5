"""What `martlet export` may be told: SWIFT's flags by name."""

from __future__ import annotations

from dataclasses import dataclass

from martlet.flag import flag

GGUF_TYPES = ("q8_0", "q4_0", "q4_1", "bf16", "f16", "f32")


@dataclass(frozen=True)
class SourceArguments:
    """Model."""

    ckpt_dir: str | None = flag("a checkpoint of a training run: an adapter, or a whole model", None, metavar="DIR")
    model: str | None = flag(
        "the model, or the base of the adapter where its checkpoint does not say", None, metavar="NAME"
    )
    model_type: str | None = flag("a registered model by its SWIFT key", None, metavar="KEY")
    model_id_or_path: str | None = flag("SWIFT's name for --model", None, metavar="PATH")
    model_revision: str | None = flag("branch, tag or commit of a repository", None, metavar="NAME")


@dataclass(frozen=True)
class ExportArguments(SourceArguments):
    """Export."""

    merge_lora: bool = flag("write the base with the adapter merged in, to CKPT-merged", False)
    replace_if_exists: bool = flag("write over what is already there", False)
    dtype: str = flag(
        "number type of merged weights (AUTO: that of the base, fp32 for a GGUF base)",
        "AUTO",
        choices=("AUTO", "bf16", "fp16", "fp32"),
    )
    to_peft_format: bool = flag("write an adapter in SWIFT's default/ layout as plain PEFT, to CKPT-peft", False)
    to: str | None = flag("another format of file", None, choices=("gguf",))
    gguf_type: str = flag("number type of its matrices", "q8_0", choices=GGUF_TYPES)
    quant_bits: int = flag("round the layers' weights to 4 or 8 bits (0: do not)", 0)
    quant_method: str = flag(
        "how: to the nearest, or so that the layers' outputs on --dataset stay", "awq", choices=("rtn", "gptq", "awq")
    )
    quant_group_size: int | None = flag(
        "inputs that share a scale, -1 for all of a row (default: 128; rtn to 8 bits: all)", None, metavar="N"
    )
    quant_act_order: bool = flag("gptq: round the inputs that matter most first", True)
    quant_n_samples: int = flag("calibration sequences", 128, metavar="N")
    quant_seqlen: int = flag("their tokens", 512, metavar="N")
    quant_device_map: str = flag("device that calibrates", "cpu", metavar="DEVICE")
    quant_output_dir: str | None = flag("SWIFT's name for --output", None, metavar="PATH")
    dataset: tuple[str, ...] = flag("texts to calibrate on: names, files, `name#500`", (), metavar="NAME")
    dataset_seed: int = flag("order in which #N takes rows", 42)
    output: str | None = flag("where the result goes (default: beside the source)", None, metavar="PATH")
    verify: bool = flag("compare logits before and after, and print what was lost", False)
    push_to_hub: bool = flag("upload the result, or the checkpoint where nothing else is asked", False)
    hub_model_id: str | None = flag("repository to upload to, NAMESPACE/NAME", None, metavar="NAME")
    hub: str = flag("which hub", "hf", choices=("hf", "modelscope"))
    hub_token: str | None = flag("token of the hub (default: that of its library)", None)
    hub_private_repo: bool = flag("make it a private repository", False)
    commit_message: str = flag("message of the upload", "update files")
