"""The `matcher` commands against a service of its own process, as a person types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matcher_service.__main__ import run
from tests.running_service import whole_service
from tests.served_process import served

D = 16


@dataclass
class Shell:
    """Runs commands in this process, with the service's addresses in the environment."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        code = run(arguments)
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The lines of JSON that a command printed: one document, or a list of several."""
        got, out, err = self(*arguments, "--json")
        assert got == code, err
        lines = [json.loads(line) for line in out.splitlines()]
        return lines[0] if len(lines) == 1 else lines


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A served data directory; its addresses stand in the environment, as for a user who exported them."""
    folder = tmp_path_factory.mktemp("service")
    with served(folder / "data", folder / "log") as process, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATCHER_HTTP_URL", f"http://127.0.0.1:{process.http_port}")
        patch.setenv("MATCHER_GRPC_ADDRESS", f"127.0.0.1:{process.grpc_port}")
        patch.setenv("MATCHER_TOKEN_FILE", str(folder / "data" / "token"))
        yield folder


@pytest.fixture
def shell(service: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


GALLERY = (
    "--controller=a force", "--lawful-basis=PACE 1984 s.64A", "--purpose=a test", "--retention=30d",
    f"--space=test/1/{D}", "--threshold=0.9",
)  # fmt: skip


def test_the_whole_of_an_operation_from_the_command_line(shell: Shell, tmp_path: Path) -> None:
    """Space, galleries, import of both formats, deployment, edge, alerts, withdrawal, audit, deletion."""
    rng = np.random.default_rng(1)
    templates = rng.normal(size=(300, D)).astype(np.float32)
    ids = [f"r{row:03}" for row in range(300)]
    subjects = [f"s{row // 3}" for row in range(300)]

    np.save(tmp_path / "centre.npy", np.zeros(D, np.float32))
    assert shell.json("spaces", "register", f"test/1/{D}", f"--centre={tmp_path / 'centre.npy'}")["sequence"] == 1
    assert shell.json("spaces", "list") == {"spaces": [{"name": "test", "version": 1, "dimension": D}]}
    assert shell.json("galleries", "create", "custody", "--kind=custody", *GALLERY)["gallery_id"] == "custody"
    shell.json(
        "watchlists", "create", "wanted", "--deployment=op", "--category=wanted_on_warrant", "--author=DC Hall",
        "--size-max=100", *GALLERY,
    )  # fmt: skip
    assert [one["gallery_id"] for one in shell.json("galleries", "list")["galleries"]] == ["custody", "wanted"]
    assert [one["gallery_id"] for one in shell.json("watchlists", "list")["watchlists"]] == ["wanted"]
    assert shell.json("galleries", "show", "custody")["retention_ms"] == 30 * 86_400_000
    assert shell.json("watchlists", "show", "wanted")["kind"] == "watchlist"

    # Import: bad rows are told and make the exit code 1; the same again changes nothing.
    spoilt = templates[:200].copy()
    spoilt[5] = 0
    npz = tmp_path / "custody.npz"
    np.savez(npz, templates=spoilt, reference_ids=np.array(ids[:200]), subject_ids=np.array(subjects[:200]))
    code, out, err = shell("import", "custody", str(npz), f"--bad-rows={tmp_path / 'bad.jsonl'}")
    assert code == 1
    assert "row 5 (r005): ZERO_TEMPLATE" in err
    assert "199 enrolled, 1 refused" in out
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == 5
    assert shell.json("import", "custody", str(npz), code=1)["repeated"] == 199
    parquet = tmp_path / "wanted.parquet"
    columns = {
        "reference_id": ids[200:],
        "subject_id": subjects[200:],
        "template": pa.FixedSizeListArray.from_arrays(pa.array(templates[200:].ravel()), D),
    }
    pq.write_table(pa.table(columns), parquet, row_group_size=30)
    entries = ("--category=wanted_on_warrant", "--reason=warrants of May", "--source=custody suite 4")
    code, _, err = shell("import", "wanted", str(parquet))
    assert code == 1
    assert "an entry of a watchlist without a" in err
    (tmp_path / "wanted.parquet.wanted.progress").unlink(missing_ok=True)
    assert shell.json("import", "wanted", str(parquet), *entries)["enrolled"] == 100
    assert shell.json("import", "wanted", str(parquet), "--replace", *entries)["replaced"] == 100
    code, _, err = shell("watchlists", "approve", "wanted", "--approved-by=dc hall", "--reason=checked")
    assert (code, "cannot approve it" in err) == (1, True)
    assert shell.json("watchlists", "approve", "wanted", "--approved-by=Supt. Gray", "--reason=checked")["approved"]
    shell.json("galleries", "create", "good", "--kind=custody", "--quality-min=0.5", *GALLERY)
    for path in (tmp_path / "good.npz", tmp_path / "good.parquet"):
        named, quality = [f"{path.suffix[1:]}{row}" for row in range(3)], np.array([0.4, 0.5, 0.9], np.float32)
        if path.suffix == ".npz":
            np.savez(path, templates=templates[:3], reference_id=np.array(named), subject_id=np.array(named),
                     quality=quality)  # fmt: skip
        else:
            values = {
                "reference_id": named,
                "subject_id": named,
                "quality": quality,
                "template": templates[:3].tolist(),
            }
            pq.write_table(pa.table(values), path)
        code, out, err = shell("import", "good", str(path))
        assert (code, "2 enrolled, 1 refused" in out, "LOW_QUALITY" in err) == (1, True, True)
    review = ("--review=+20d", "--reviewed-by=Sgt. Low", "--reason=charged")
    shell.json("references", "review", "custody", "r007", *review)
    assert shell.json("references", "show", "custody", "r007")["source"] == "records of a force"

    held = shell.json("references", "list", "custody", "--limit=0")
    assert [one["reference_id"] for one in held] == [one for one in ids[:200] if one != "r005"]
    assert [one["reference_id"] for one in shell.json("references", "list", "custody", "--limit=2")] == ["r000", "r001"]
    assert shell.json("references", "show", "custody", "r007")["subject_id"] == "s2"
    assert len(shell.json("subjects", "show", "s2")["references"]) == 3

    # Search: every template finds its own subject; one that is not finite is rejected, and the exit code is 1.
    shell.json(
        "deployments", "create", "op", "--gallery=custody", "--gallery=wanted", "--closes=+12h",
        "--authorised-by=Insp. Reed", "--reason=a test", "--place=here",
    )  # fmt: skip
    assert shell.json("deployments", "show", "op")["authorised_by"] == "Insp. Reed"
    assert [one["deployment_id"] for one in shell.json("deployments", "list")["deployments"]] == ["op"]
    asked = [row for row in range(0, 300, 2) if row != 5]
    probes = tmp_path / "probes.npz"
    np.savez(probes, templates=templates[asked], probe_ids=np.array([f"p{row}" for row in asked]))
    *answers, last = shell.json("edge", str(probes), "--deployment=op", "--batch=7")
    assert {one["probe_id"]: one["candidates"][0]["subject_id"] for one in answers} == {
        f"p{row}": subjects[row] for row in asked
    }
    assert last["summary"]["alerts"] == last["summary"]["answered"] == len(asked)
    assert 0 < last["summary"]["latency_ms"]["p50"] <= last["summary"]["latency_ms"]["max"]
    np.savez(probes, templates=np.vstack([templates[:3], np.full((1, D), np.nan, np.float32)]))
    code, out, err = shell("edge", str(probes), "--deployment=op", "--rate=1000")
    assert code == 1
    assert "3 alerts, 0 without candidate, 0 incomplete, 1 rejected" in out
    assert "NOT_FINITE 1" in out
    assert "ALERT  probe row-1: s0 (custody) score 1.000" in err
    shell.json(
        "cases", "create", "case-1", "--gallery=custody", "--closes=+1h", "--requested-by=DC Hall", "--purpose=a test"
    )
    assert [one["case_reference"] for one in shell.json("cases", "list")["cases"]] == ["case-1"]

    alerts = shell.json("alerts", "list", "--deployment=op", "--limit=0")
    assert len(alerts) == len(asked) + 3
    code, out, _ = shell("alerts", "list", "--limit=1")
    assert (code, len(out.splitlines())) == (0, 2)

    # Adjudication.
    alert_id = shell.json("alerts", "list", "--limit=1")["alert_id"]
    shell.json("alerts", "adjudicate", alert_id, "rejected", "--by=PC Ames", "--reason=another person")
    assert json.loads(shell("alerts", "show", alert_id, "--json")[1])["state"] == "rejected"

    # Withdrawal, end and deletion.
    assert len(shell.json("subjects", "ground-ended", "s66", "acquitted", "--reason=Crown Court")["withdrawn"]) == 2
    assert shell.json("references", "withdraw", "custody", "r000", "--reason=court order")["withdrawn"] == [
        {"gallery_id": "custody", "reference_id": "r000"}
    ]
    assert len(shell.json("subjects", "withdraw", "s1", "--reason=court order")["withdrawn"]) == 2
    code, _, err = shell("references", "show", "custody", "r000")
    assert code == 1
    assert "NOT_FOUND" in err
    shell.json("deployments", "end", "op")
    code, out, err = shell("edge", str(probes), "--deployment=op")
    assert code == 1
    assert "4 rejected" in out, err
    # Its watchlist went with the deployment.
    code, _, err = shell("galleries", "delete", "wanted", "--reason=over", "--yes")
    assert (code, "UNKNOWN_GALLERY" in err) == (1, True)
    assert [one["gallery_id"] for one in shell.json("galleries", "list")["galleries"]] == ["custody", "good"]

    # The audit holds, and what an earlier checkpoint covers is in it still; it can be checked without the service.
    kept, exported = tmp_path / "checkpoint", tmp_path / "audit"
    made = shell.json("audit", "checkpoint", f"--out={kept}")
    assert shell.json("audit", "rotate-key", "--reason=yearly")["key"] != made["key"]
    assert shell.json("audit", "export", str(exported))["records"] == made["size"] + 1
    offline = ("--http=http://127.0.0.1:1", f"--checkpoint={kept}")
    head = shell.json("audit", "verify", str(exported), *offline)
    assert (head["intact"], head["compared"], head["key_known"]) == (True, made["size"], True)
    assert shell.json("audit", "verify", f"--checkpoint={kept}")["hash"] == head["hash"]
    records = shell.json("audit", "list", "--limit=0")
    assert [one["index"] for one in records] == list(range(1, head["records"] + 1))
    lines = exported.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[:3]))
    code, _, err = shell("audit", "verify", str(tmp_path / "cut"), *offline)
    assert code == 1
    assert "it was cut" in err

    # Single proofs, fetched from the service and checked without it.
    (tmp_path / "record").write_bytes(lines[2])
    shell.json("audit", "prove", "--index=3", f"--out={tmp_path / 'covered'}")
    shell.json("audit", "prove", f"--older={made['size']}", f"--out={tmp_path / 'past'}")
    known = (f"--key={head['checkpoint']['key']}",)
    shown = shell.json("audit", "verify-proof", str(tmp_path / "covered"), f"--record={tmp_path / 'record'}", *known)
    assert (shown["proved"], shown["index"], shown["key_known"]) == (True, 3, True)
    shown = shell.json("audit", "verify-proof", str(tmp_path / "past"), f"--checkpoint={kept}", *known)
    assert (shown["older"], shown["checkpoint"]["size"]) == (made["size"], head["records"])
    (tmp_path / "record").write_bytes(lines[3].replace(b'"index":4', b'"index":3'))
    code, _, err = shell("audit", "verify-proof", str(tmp_path / "covered"), f"--record={tmp_path / 'record'}")
    assert (code, "not covered" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("galleries", "show", "none"), "UNKNOWN_GALLERY"),
        (("references", "list", "none"), "UNKNOWN_GALLERY"),
        (("deployments", "show", "none"), "NOT_FOUND"),
        (("galleries", "create", "x", "--kind=zoo", *GALLERY), "INVALID"),
        (("galleries", "list", "--http=http://127.0.0.1:1"), "UNREACHABLE"),
        (("galleries", "list", "--http=http://192.0.2.1:80"), "INVALID"),
        (("galleries", "list", "--http=nowhere"), "INVALID"),
        (("galleries", "list", "--token-file=/none/such"), "UNAUTHENTICATED"),
        (("subjects", "withdraw", "none", "--reason= "), "INVALID"),
    ],
)
def test_a_refusal_prints_cause_and_hint_and_exits_with_1(shell: Shell, arguments: tuple[str, ...], cause: str) -> None:
    """Nothing goes to standard output; standard error names the cause and, on a second line, what to do."""
    code, out, err = shell(*arguments)
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith(f"matcher: {cause}: ")
    assert second.strip()


def test_a_wrong_token_is_refused_over_both_transports(shell: Shell, tmp_path: Path) -> None:
    """The file named wins over the environment, and a token that is not the service's opens nothing."""
    wrong = tmp_path / "token"
    wrong.write_text("not-the-token-of-this-service-at-all\n")
    np.savez(tmp_path / "probes.npz", templates=np.ones((2, D), np.float32))
    for arguments in (
        ("galleries", "list"),
        ("alerts", "watch", "--count=1"),
    ):
        code, _, err = shell(*arguments, f"--token-file={wrong}")
        assert code == 1
        assert "UNAUTHENTICATED" in err
    code, _, err = shell(
        "edge", str(tmp_path / "probes.npz"), "--deployment=op", f"--space=test/1/{D}", f"--token-file={wrong}"
    )
    assert code == 1
    assert "UNAUTHENTICATED" in err


def test_the_token_may_come_from_the_environment(shell: Shell, service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATCHER_TOKEN serves where no file is named."""
    monkeypatch.delenv("MATCHER_TOKEN_FILE")
    monkeypatch.setenv("MATCHER_TOKEN", (service / "data" / "token").read_text().strip())
    assert shell("galleries", "list")[0] == 0


def test_keys_are_rotated_and_wrapped_anew_and_erasures_shown(shell: Shell, tmp_path: Path) -> None:
    shell.json("spaces", "register", f"keys/1/{D}", "--centre=zero")
    terms = [one for one in GALLERY if not one.startswith("--space")]
    shell.json("galleries", "create", "sealed", "--kind=custody", f"--space=keys/1/{D}", *terms)
    templates = np.random.default_rng(3).normal(size=(20, D)).astype(np.float32)
    names = np.array([f"k{row}" for row in range(20)])
    np.savez(tmp_path / "sealed.npz", templates=templates, reference_ids=names, subject_ids=names)
    assert shell.json("import", "sealed", str(tmp_path / "sealed.npz"))["enrolled"] == 20
    assert "Nothing has been erased." in shell("erasures", "list", "--gallery=sealed")[1]

    told = shell.json("keys", "rotate", "sealed", "--reason=yearly", "--wait")
    assert (told["generation"], told["resealed"], told["share"]) == (2, 20, 1.0)
    assert told["resealed_at_ms"] is not None
    assert [one["gallery_id"] for one in shell.json("keys", "list")["keys"]] == ["sealed"]
    assert "sealed" in shell("keys", "list")[1]
    code, _, err = shell("keys", "rotate", "nowhere", "--reason=x")
    assert (code, "NOT_FOUND" in err or "UNKNOWN_GALLERY" in err) == (1, True)
    assert "keys wrapped anew by file:" in shell("keys", "rewrap")[1]

    shell.json("references", "withdraw", "sealed", "k3", "--reason=x")
    waiting = shell.json("erasures", "list", "--gallery=sealed")["waiting"]
    assert waiting["templates"] <= 1
    code, _, err = shell("erasures", "show", "999")
    assert (code, "no receipt 999" in err) == (1, True)


async def test_inspect_tells_an_intact_index_from_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an ordered stop the files hold every row; a changed bit is found, and a directory in use is left alone."""
    data_dir = tmp_path / "data"
    async with whole_service(data_dir, index={"segment_rows_max": 1000}) as service:
        space = await service.space(D)
        await service.gallery("custody", space)
        templates = np.random.default_rng(7).normal(size=(1500, D)).astype(np.float32)
        await service.enrol("custody", space, templates, [f"r{row}" for row in range(1500)])
        capsys.readouterr()
        assert run(["inspect", str(data_dir)]) == 1
        assert "in use by process" in capsys.readouterr().err
    assert run(["inspect", str(data_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["live"] == 1500
    segment = Path(report["directory"]) / report["galleries"][0]["segments"][0]["file"]
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    assert run(["inspect", str(data_dir)]) == 1
    out, _ = capsys.readouterr()
    assert f"problem: {segment.name}" in out
    assert run(["inspect", str(tmp_path / "none")]) == 1
    assert "no directory" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
