"""The commands as such: what they print, parse, import and document."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from matcher_service import __main__ as program
from matcher_service.commands.latency import Latencies
from matcher_service.commands.output import shown
from matcher_service.commands.serving import described
from matcher_service.commands.times import duration_in_words, duration_ms, in_words, time_ms
from matcher_service.errors import InvalidInput, StartRefused
from matcher_service.settings import load


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    group = group or typer.main.get_command(program.app)
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, (*path, name))
        else:
            yield (*path, name), one


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    """`matcher --help` loads neither numpy nor any server, wire or database library."""
    heavy = ("numpy", "grpc", "fastapi", "faiss", "sqlalchemy", "uvicorn", "pydantic", "httpx", "pyarrow", "scipy")
    script = (
        "import sys; from matcher_service.__main__ import run; code = run(['--help']); "
        f"print([name for name in {heavy!r} if name in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[] 0"
    assert "serve" in done.stdout


@pytest.mark.parametrize(
    ("words", "command"), list(commands()), ids=lambda one: " ".join(one) if isinstance(one, tuple) else ""
)
def test_every_command_explains_itself_and_prints_json_if_asked(words: tuple[str, ...], command: Any) -> None:
    """Each has help, for itself and for each option; each that prints a result has --json."""
    assert command.help
    options = {name: one for one in command.params for name in getattr(one, "opts", [])}
    for name, one in options.items():
        if name.startswith("--"):
            assert one.help, f"{words} {name}"
    assert ("--json" in options) == (words != ("serve",))


@pytest.mark.parametrize("arguments", [["galleries", "create"], ["nonsense"], ["edge"], ["serve", "--http-port=x"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As other programs do; what is wrong goes to standard error."""
    assert program.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err


def test_every_setting_says_what_it_means() -> None:
    """`matcher settings` is the reference: a setting without a description fails here."""
    rows = list(described(load()))
    assert [row["name"] for row in rows if len(row["meaning"]) < 10] == []
    assert {"server", "storage", "limits", "admission", "batching", "index", ""} <= {row["section"] for row in rows}


def test_each_setting_is_set_by_the_variable_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed name of the environment variable is the one that works, for each whole number there is."""
    for row in described(load()):
        if type(row["default"]) is int and row["section"] == "limits" and row["name"].startswith(("rank", "streams")):
            monkeypatch.setenv(row["variable"], str(row["default"] - 1))
            (changed,) = [one for one in described(load()) if one["variable"] == row["variable"]]
            assert changed["value"] == row["default"] - 1


def test_settings_show_what_a_file_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default stands beside the value in force, for people and as JSON."""
    config = tmp_path / "matcher.toml"
    config.write_text("[server]\nhttp_port = 9090\n")
    assert program.run(["settings", f"--config={config}"]) == 0
    assert "http_port = 8080 (here: 9090)" in capsys.readouterr().out
    assert program.run(["settings", f"--config={config}", "--json"]) == 0
    rows = {(row["section"], row["name"]): row for row in json.loads(capsys.readouterr().out)}
    assert (rows["server", "http_port"]["default"], rows["server", "http_port"]["value"]) == (8080, 9090)
    config.write_text("[server]\nhttp_prot = 9090\n")
    assert program.run(["settings", f"--config={config}"]) == 1
    assert "http_prot" in capsys.readouterr().err


def test_serve_options_win_over_the_environment_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Option, then environment, then file; what is not given keeps its place."""
    config = tmp_path / "matcher.toml"
    config.write_text("[server]\nhttp_port = 1001\ngrpc_port = 1002\nmetrics_port = 1003\n")
    monkeypatch.setenv("MATCHER_SERVER__GRPC_PORT", "2002")
    monkeypatch.setenv("MATCHER_SERVER__HTTP_PORT", "2001")
    served: list[Any] = []

    def serve(settings: Any) -> int:
        served.append(settings)
        return 7

    from matcher_service import bootstrap

    monkeypatch.setattr(bootstrap, "serve", serve)
    arguments = ["serve", f"--config={config}", "--http-port=3001", f"--data-dir={tmp_path / 'd'}"]
    assert program.run(arguments) == 7
    server = served[0].server
    assert (server.http_port, server.grpc_port, server.metrics_port) == (3001, 2002, 1003)
    assert served[0].storage.data_dir == tmp_path / "d"


def test_serve_beyond_loopback_without_tls_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The settings say no before anything listens."""
    assert program.run(["serve", "--host=192.0.2.1"]) == 1
    assert "loopback" in capsys.readouterr().err


def test_an_edge_needs_one_authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a deployment nor a case, or both: refused before anything is read or sent."""
    for arguments in ([], ["--deployment=d", "--case=c"]):
        assert program.run(["edge", str(tmp_path / "none.npz"), *arguments]) == 1
        assert "--deployment or --case" in capsys.readouterr().err


def test_a_defect_is_not_passed_off_as_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors of the tree are told in two lines; anything else keeps its traceback."""

    def broken(**_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(program, "app", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        program.run(["settings"])


def test_an_error_prints_its_cause_field_and_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two lines on standard error: what and where, then what to do."""

    def refused(**_: Any) -> None:
        raise StartRefused("is taken", field="server.http_port", hint="choose another port")

    monkeypatch.setattr(program, "app", refused)
    assert program.run(["serve"]) == 1
    assert capsys.readouterr().err == "matcher: INTERNAL: server.http_port: is taken\n    choose another port\n"


# --- values that people type -------------------------------------------------------------------------------


@given(st.integers(0, 10**14))
def test_a_duration_in_words_reads_back_as_itself(ms: int) -> None:
    """What is shown can be typed."""
    assert duration_ms(duration_in_words(ms), "x") == ms


@given(st.integers(0, 4 * 10**9))
def test_a_time_in_words_reads_back_as_itself(seconds: int) -> None:
    """To the second, in UTC."""
    assert time_ms(in_words(seconds * 1000).replace(" ", "T"), "x", 0) == seconds * 1000


def test_times_are_absolute_or_from_now() -> None:
    """`now`, `+12h`, Z and offsets; a time without its offset is refused, since nobody knows which one was meant."""
    assert time_ms("now", "x", 5) == 5
    assert time_ms("+12h", "x", 5) == 5 + 12 * 3_600_000
    assert time_ms("1970-01-01T01:00:01+01:00", "x", 5) == 1000
    for wrong in ("2026-03-01T08:00:00", "tomorrow", "+12", "12h", ""):
        with pytest.raises(InvalidInput) as refused:
            time_ms(wrong, "closes", 5)
        assert refused.value.field == "closes"
        assert refused.value.hint
    for wrong in ("12", "h", "1.5h", "-1h", "1 h"):
        with pytest.raises(InvalidInput):
            duration_ms(wrong, "retention")


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_latency_quantiles_are_right_to_one_percent(latencies: list[float], share: float) -> None:
    """In bounded memory, whatever the spread; the greatest is exact."""
    held = Latencies()
    for one in latencies:
        held.add(one)
    exact = float(np.quantile(latencies, share, method="inverted_cdf"))
    assert exact * 0.999999 <= held.quantile_s(share) <= exact * 1.0101
    assert held.quantile_s(1.0) == pytest.approx(max(latencies))
    assert held.count == len(latencies)


def test_latencies_of_nothing_and_beyond_the_range() -> None:
    """No latency has no quantile; extremes do not fall out."""
    assert math.isnan(Latencies().quantile_s(0.5))
    held = Latencies()
    held.add(0.0)
    held.add(1e9)
    assert held.quantile_s(0.5) <= 1e-5
    assert held.quantile_s(1.0) <= 1e9


def test_values_are_shown_by_the_unit_in_their_name() -> None:
    """Times of day, durations, spaces and lists read as people write them."""
    assert shown("created_at_ms", 1000) == "1970-01-01 00:00:01Z"
    assert shown("at_ms", 1000) == "1970-01-01 00:00:01Z"
    assert shown("ended_at_ms", None) == "-"
    assert shown("retention_ms", 86_400_000) == "1d"
    assert shown("space", {"name": "arcface", "version": 3, "dimension": 512}) == "arcface/3/512"
    assert shown("gallery_ids", ["a", "b"]) == "a, b"
    assert shown("threshold", 0.30000001) == "0.3"
    assert shown("complete", True) == "yes"
