"""What the gallery log costs in PostgreSQL: `python -m benchmarks.postgres_log --help`.

A real server, two gateways' logs on it. Messages of references go in through one of them, by COPY as the service does
it and, interleaved, by plain inserts; meanwhile references are withdrawn one by one through each of the two, which
shows how long a withdrawal waits for an import. The SQLite log takes the same messages for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import MetaData

from matcher_service.clock import SystemClock
from matcher_service.gallery import schema
from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.gallery.postgres import PostgresDatabase, open_postgres_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    CreateGallery,
    Enrol,
    EnrolRows,
    Gallery,
    GalleryKind,
    Receipt,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
    Withdraw,
)
from tests.cluster.served_postgres import served_postgres

ACTOR = Actor("benchmark")
WITHDRAW_EVERY_S = 0.02


async def stock(log: SqlGalleryLog, space: SpaceId, to_withdraw: int) -> None:
    gallery = Gallery("g", GalleryKind.CUSTODY, "c", "l", "p", 10**10, space, 0.5)
    centre = np.zeros(space.dimension, np.float32)
    await log.append([RegisterSpace(TemplateSpace(space, centre)), CreateGallery(gallery)], ACTOR)
    template = np.ones(space.dimension, "<f2").tobytes()
    await log.append([Enrol("g", f"w{number}", "s", template) for number in range(to_withdraw)], ACTOR)


async def enrol(log: SqlGalleryLog, name: str, templates: np.ndarray) -> float:
    """Enrol one message; seconds until its receipts are there."""
    ids = [f"{name}.{row}" for row in range(len(templates))]
    rows = EnrolRows("g", ids, ids, templates, np.zeros(len(ids), np.int64), False, name)
    began = time.perf_counter()
    receipts = await log.enrol(rows, ACTOR)
    assert not receipts.refusals
    return time.perf_counter() - began


async def withdrawals(log: SqlGalleryLog, names: list[str], until: asyncio.Event) -> list[float]:
    """Milliseconds of each, one at a time, until told to stop."""
    waits = []
    while not until.is_set() and names:
        began = time.perf_counter()
        (answer,) = await log.append([Withdraw("g", names.pop(), "measured")], ACTOR)
        assert isinstance(answer, Receipt), answer
        waits.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(WITHDRAW_EVERY_S)
    return waits


async def importing(log: SqlGalleryLog, messages: int, in_flight: int, templates: np.ndarray, name: str) -> float:
    """References per second with some messages always in flight, as a stream of an import has them."""
    left = iter(range(messages))

    async def stream() -> None:
        for number in left:
            await enrol(log, f"{name}{number}", templates)

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(in_flight)))
    return messages * len(templates) / (time.perf_counter() - began)


def staging(url: str, rows: int, times: int, row_bytes: int) -> dict[str, float]:
    """Milliseconds inside the turn for one message: by COPY into the table, and from a staging table that was filled
    before."""
    database = PostgresDatabase(url, 1)
    apart = MetaData()
    direct, staged = (schema.entry.to_metadata(apart, name=name) for name in ("direct", "staged"))
    with database.writer.begin() as connection:
        for name, like in (("direct", "INCLUDING ALL"), ("appended", "INCLUDING ALL"), ("staged", "")):
            connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE entry {like})")
    spent: dict[str, list[float]] = {"direct": [], "appended": []}
    sealed = bytes(row_bytes)
    for begin in range(0, rows * times, rows):
        message: list[tuple[object, ...]] = [
            (begin + row, 1, 0, "g", f"reference {begin + row}", f"subject {begin + row}", 0, sealed, None, None)
            for row in range(rows)
        ]
        with database.writer.begin() as connection:
            began = time.perf_counter()
            schema.insert_many(connection, direct, message)
            spent["direct"].append(time.perf_counter() - began)
        with database.writer.begin() as connection:
            schema.insert_many(connection, staged, message)
            began = time.perf_counter()
            connection.exec_driver_sql("INSERT INTO appended SELECT * FROM staged")
            connection.exec_driver_sql("TRUNCATE staged")
            spent["appended"].append(time.perf_counter() - began)
    with database.writer.begin() as connection:
        connection.exec_driver_sql("DROP TABLE direct, appended, staged")
    database.dispose()
    return {f"{name}_ms": 1000 * statistics.median(each) for name, each in spent.items()}


async def measure(rows: int, messages: int, dimension: int) -> dict[str, float]:
    space = SpaceId("bench", 1, dimension)
    templates = np.random.default_rng(5).standard_normal((rows, dimension)).astype("<f2")
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, served_postgres() as served:
        url, keys = served.create("bench"), Path(folder) / "keys"
        one = await open_postgres_log(url, keys, StorageSettings(), SystemClock())
        other = await open_postgres_log(url, keys, StorageSettings(), SystemClock())
        local = await open_sqlite_log(Path(folder), Path(folder) / "sqlite-keys", StorageSettings(), SystemClock())
        await stock(one, space, 5000)
        await stock(local, space, 0)
        spent: dict[str, list[float]] = {"copy": [], "inserts": [], "sqlite": []}
        for number in range(messages):
            spent["copy"].append(await enrol(one, f"c{number}", templates))
            with patch.object(schema, "_COPY_ROWS_MIN", rows + 1):
                spent["inserts"].append(await enrol(one, f"i{number}", templates))
            spent["sqlite"].append(await enrol(local, f"s{number}", templates))
        found |= {f"{name}_references_per_s": rows / statistics.median(times) for name, times in spent.items()}

        names = [f"w{number}" for number in range(5000)]
        for situation in ("idle", "importing"):
            over = asyncio.Event()
            watched = asyncio.gather(*(withdrawals(log, names, over) for log in (one, other)))
            if situation == "importing":
                found["stream_references_per_s"] = await importing(one, messages, 8, templates, "m")
            else:
                await asyncio.sleep(2)
            over.set()
            for gateway, waits in zip(("same", "other"), await watched, strict=True):
                found[f"withdrawal_ms_{situation}_{gateway}_median"] = statistics.median(waits)
                found[f"withdrawal_ms_{situation}_{gateway}_max"] = max(waits)
        for log in (one, other, local):
            await log.close()
        # Float16, with nonce and tag.
        found |= await asyncio.to_thread(staging, url, rows, messages, 2 * dimension + 28)
    found["copy_over_inserts"] = found["copy_references_per_s"] / found["inserts_references_per_s"]
    found["appended_over_direct"] = found["appended_ms"] / found["direct_ms"]
    found["transaction_ms"] = 1000 * statistics.median(spent["copy"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="references of a message (default 4096)")
    parser.add_argument("--messages", type=int, default=20, help="messages of each kind (default 20)")
    parser.add_argument("--dimension", type=int, default=512, help="of the templates (default 512)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args()
    found = asyncio.run(measure(chosen.rows, chosen.messages, chosen.dimension))
    if chosen.json:
        print(json.dumps(found))
        return
    table = Table("what", "value", title=f"{chosen.messages} messages of {chosen.rows} x {chosen.dimension}")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
