"""How a shard's process is put together: its settings, and the repository that its model stands in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from matcher_service.__main__ import app
from matcher_service.errors import StartRefused
from matcher_service.models.repository import assemble
from matcher_service.partitions import parse, share

SOURCE = Path(__file__).parents[2] / "triton_models"
GIVEN = {"data_dir": "/d", "keys_dir": "/k", "log_url": "postgresql://h/n"}


@pytest.fixture(autouse=True)
def _with_psycopg() -> None:
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")


def test_parameters_win_over_the_environment_and_empty_ones_count_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """So one environment serves all shards of a server, and each has its own parameters."""
    from matcher_service.shard_bootstrap import load_settings

    for name, value in (("LOG_URL", "postgresql://h/n"), ("THREADS", "3"), ("PARTITIONS", "0-9"), ("LOG_URL_FILE", "")):
        monkeypatch.setenv(f"MATCHER_SHARD_{name}", value)
    settings = load_settings({"data_dir": "/d", "keys_dir": "/k", "partitions": "7", "threads": ""})
    assert (settings.partitions, settings.threads) == ("7", 3)
    assert settings.address() == "postgresql://h/n"
    assert "postgresql" not in repr(settings)


def test_the_log_may_be_named_by_a_file_which_is_read_each_time(tmp_path: Path) -> None:
    """A secret that is rotated needs no restart."""
    from matcher_service.shard_bootstrap import load_settings

    file = tmp_path / "url"
    settings = load_settings({"data_dir": "/d", "keys_dir": "/k", "log_url_file": str(file)})
    with pytest.raises(StartRefused):
        settings.address()
    for address in ("postgresql://a/n", "postgresql://b/n"):
        file.write_text(f"{address}\n")
        assert settings.address() == address


@pytest.mark.parametrize(
    "wrong",
    [
        {"data_dir": ""},
        {"keys_dir": ""},
        {"log_url": ""},
        {"log_url_file": "/f"},
        {"partitions": "0-256"},
        {"partitions": "some"},
        {"threads": "-1"},
        {"colour": "blue"},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict[str, str]) -> None:
    """The model does not load then: this is no fault that passes."""
    from matcher_service.shard_bootstrap import load_settings

    with pytest.raises(StartRefused) as refused:
        load_settings({**GIVEN, **wrong})
    assert next(iter(wrong)).partition("_")[0] in refused.value.detail
    assert refused.value.hint


def test_each_shard_of_a_server_is_a_model_of_its_own(tmp_path: Path) -> None:
    """Under its name, with its partitions and its folder; one instance each."""
    done = CliRunner().invoke(
        app,
        f"triton-repository {tmp_path}/models --source {SOURCE} --only-shards --json "
        "--shard a=0-127 --shard b=128-255 --volumes /volumes",
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["models"] == ["a", "b"]
    for number, name in enumerate("ab"):
        config = (tmp_path / "models" / name / "config.pbtxt").read_text()
        assert f'name: "{name}"' in config
        assert f'key: "data_dir" value: {{ string_value: "/volumes/{name}" }}' in config
        (partitions,) = (line for line in config.splitlines() if line.startswith('parameters { key: "partitions"'))
        assert parse(partitions.split('"')[3]) == share(number, 2)
        assert "count: 1" in config
        assert (tmp_path / "models" / name / "1" / "model.py").is_file()


def test_an_instance_on_a_gpu_filters_there_unless_told_otherwise(tmp_path: Path) -> None:
    """On that GPU and no other; the repository says which kind of instance it is."""
    from matcher_service.shard_bootstrap import index_settings, load_settings

    found = [
        index_settings(load_settings({**GIVEN, "scanner": scanner}), gpu)
        for scanner, gpu in (("", ""), ("", "cuda:1"), ("cpu", "cuda:1"), ("gpu-faiss", "cuda:0"))
    ]
    assert [(one.scanner, one.gpu_devices) for one in found] == [
        ("cpu", ()),
        ("gpu", ("cuda:1",)),
        ("cpu", ("cuda:1",)),
        ("gpu-faiss", ("cuda:0",)),
    ]
    for on_gpu in (False, True):
        made = assemble(SOURCE, tmp_path / str(on_gpu), models=(), shards={"a": {}}, on_gpu=on_gpu)
        assert f"count: 1 kind: {'KIND_GPU' if on_gpu else 'KIND_CPU'}" in (made / "a/config.pbtxt").read_text()


@pytest.mark.parametrize("asked", ["a", "a=", "=0-3", "a/b=0-3", "a=0-300"])
def test_a_shard_that_is_not_named_or_owns_nothing_is_refused(tmp_path: Path, asked: str) -> None:
    """Before anything is written."""
    into = tmp_path / "models"
    done = CliRunner().invoke(app, ["triton-repository", str(into), "--source", str(SOURCE), "--shard", asked])
    assert done.exit_code != 0
    assert not into.exists()


def test_a_parameter_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    """Rather than passed over."""
    with pytest.raises(StartRefused, match="colour"):
        assemble(SOURCE, tmp_path / "models", models=(), shards={"a": {"colour": "blue"}})
