"""The shared flags agree with the rooms they speak to."""

from __future__ import annotations

import dataclasses

import pytest

from martlet import backends, hub
from martlet.cli import deploy, infer, options, swift_flags
from martlet.cli.flags import parse
from martlet.errors import MartletError
from martlet.hub.card import ModelCard
from martlet.runners.base import LoadOptions


def test_names_that_are_written_twice_agree():
    assert options.DEFAULT_MODEL == hub.DEFAULT_MODEL  # flags know it without importing the hub
    assert set(options.BACKENDS) <= set(backends.NAMES)


@pytest.mark.parametrize(
    ("command", "not_yet"), [(infer.InferOptions, swift_flags.INFER), (deploy.DeployOptions, swift_flags.DEPLOY)]
)
def test_a_flag_is_either_honoured_or_refused(command, not_yet):
    assert not_yet.isdisjoint(f.name for f in dataclasses.fields(command))


def test_every_load_option_can_be_set():
    words = ["--device", "cpu", "--dtype", "bf16", "--max_model_len", "64", "--max_num_seqs", "3"]
    words += ["--kv_cache_tokens", "128", "--gpu_memory_utilization", "0.5", "--quant", "q"]
    flags = parse(infer.InferOptions, words)
    wanted = LoadOptions(
        "cpu", "bfloat16", "q", max_model_len=64, max_num_seqs=3, kv_cache_tokens=128, memory_utilization=0.5
    )
    assert options.load_options(flags, flags) == wanted


@pytest.mark.parametrize(
    ("words", "name", "model_type"),
    [
        ([], options.DEFAULT_MODEL, None),
        (["--model", "a"], "a", None),
        (["--model_id_or_path", "b"], "b", None),
        (["--model_type", "c"], "c", None),
        (["--model_type", "c", "--model_id_or_path", "./d"], "./d", "c"),
    ],
)
def test_which_model_is_resolved(words, name, model_type, monkeypatch):
    asked = {}

    def resolve(name, **more):
        asked.update(more, name=name)

    monkeypatch.setattr(hub, "resolve", resolve, raising=False)
    options.resolve_model(parse(infer.InferOptions, [*words, "--load_format", "dummy"]))
    assert (asked["name"], asked["model_type"], asked["load_format"]) == (name, model_type, "dummy")


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
    ],
)
def test_a_model_samples_as_its_generation_config_says(config, temperature, tmp_path):
    card = ModelCard("m", tmp_path, "dummy", "llama", generation_config=config)
    assert options.own_settings(card)["temperature"] == temperature


def test_deploy_hands_everything_to_the_server(monkeypatch, capsys, tmp_path):
    from martlet import server

    seen = []
    card = ModelCard("m", tmp_path, "dummy", "llama")
    monkeypatch.setattr(deploy, "resolve_model", lambda flags, chosen: card)
    monkeypatch.setattr(server, "run", lambda wanted: seen.append(wanted) or 0, raising=False)
    words = ["--host", "0.0.0.0", "--port", "81", "--served_model_name", "a", "b", "--api_key", "k1", "--api-key", "k2"]
    words += ["--infer_backend", "pt", "--template_type", "chatml", "--enable_prefix_caching", "false"]
    assert deploy.run(parse(deploy.DeployOptions, words)) == 0
    (got,) = seen
    assert (got.model, got.backend, got.template, got.host, got.port) == (card, "pt", "chatml", "0.0.0.0", 81)
    assert (got.served_model_names, got.api_keys) == (("a", "b"), ("k1", "k2"))
    assert got.engine.enable_prefix_caching is False
    assert capsys.readouterr().err == ""
    deploy.run(parse(deploy.DeployOptions, ["--host", "0.0.0.0"]))
    assert "whoever reaches 0.0.0.0 may use this server" in capsys.readouterr().err


def test_deploy_reads_keys_limits_and_defaults(monkeypatch, tmp_path):
    from martlet import server
    from martlet.server.options import Limits

    seen = []
    monkeypatch.setattr(deploy, "resolve_model", lambda flags, chosen: ModelCard("m", tmp_path, "dummy", "llama"))
    monkeypatch.setattr(server, "run", lambda wanted: seen.append(wanted) or 0, raising=False)
    (tmp_path / "keys").write_text("one # the first\n\n# nobody\n two \n")
    words = ["--api_key", "zero", "--api_key_file", str(tmp_path / "keys"), "--max_requests_per_key", "2"]
    words += ["--max_body_mb", "0.5", "--request_timeout", "9", "--top_k", "5", "--do_sample", "false", "--seed", "4"]
    words += ["--owned_by", "me", "--log_interval", "0", "--ssl_certfile", "c", "--ssl_keyfile", "k", "--uds", "u"]
    assert deploy.run(parse(deploy.DeployOptions, words)) == 0
    (wanted,) = seen
    assert wanted.api_keys == ("zero", "one", "two")
    assert wanted.limits == Limits(max_body_bytes=2**19, max_requests_per_key=2, request_seconds=9)
    assert wanted.defaults == {"top_k": 5, "temperature": 0.0} and wanted.engine.seed == 4
    assert (wanted.owned_by, wanted.log_interval, wanted.uds) == ("me", 0, "u")
    assert (wanted.ssl_certfile, wanted.ssl_keyfile) == ("c", "k")


@pytest.mark.parametrize(
    ("words", "param"),
    [
        (["--api_key_file", "no/such/file"], "api_key_file"),
        (["--max_requests_per_key", "2"], "max_requests_per_key"),
        (["--request_timeout", "0"], "request_timeout"),
        (["--adapter_dir", "no/such/folder"], "adapter_dir"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_deploy_refuses_what_cannot_be_before_a_model_is_looked_for(words, param):
    with pytest.raises(MartletError) as caught:
        deploy.run(parse(deploy.DeployOptions, words))
    assert caught.value.param == param
