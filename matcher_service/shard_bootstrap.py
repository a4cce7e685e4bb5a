"""Puts a shard's process together: settings, keys, log, files. For a shard, the only place that chooses.

The process is the one that Triton's Python backend makes for an instance of the model `gallery_shard`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from matcher_service import interpreter, logs, process_lock
from matcher_service.clock import SystemClock
from matcher_service.errors import InvalidInput, NotFound, StartRefused
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.index.snapshots import Key
from matcher_service.partitions import parse
from matcher_service.seams import GalleryLog
from matcher_service.settings import IndexSettings, KeySettings, StorageSettings
from matcher_service.shards.following import FollowingShard, OpenLog
from matcher_service.shards.hosted import HostedShard, Opening
from matcher_service.terms import DataKey

# A predecessor that was told to end still writes its files.
_LOCK_S_MAX = 30.0
_LOCK_RETRY_S = 0.25


class _Configured(BaseSettings):
    """Settings of a shard, by environment variable MATCHER_SHARD_<NAME> or by a parameter of the model, which wins.
    One of an empty text counts as not given."""

    model_config = SettingsConfigDict(env_prefix="MATCHER_SHARD_", frozen=True, extra="forbid", env_ignore_empty=True)


def _sensible(partitions: str) -> str:
    try:
        parse(partitions)
    except InvalidInput as unfit:
        raise ValueError(f"{unfit.detail}; {unfit.hint}") from unfit
    return partitions


class ShardSettings(_Configured):
    data_dir: Path = Field(description="Folder of this shard alone: its assignment and its segments.")
    keys_dir: Path = Field(description="The keys directory that the gateways use too; it is only read.")
    log_url: SecretStr = Field(SecretStr(""), description="postgresql://user:password@host/database of the log.")
    log_url_file: Path | None = Field(None, description="A file that holds that address instead.")
    partitions: Annotated[str, AfterValidator(_sensible)] = Field(
        "all", description='Partitions to own: ranges such as "0-63, 70", "all", "none", or a bitmap in hexadecimal.'
    )
    key_service_url: str = Field("", description="Where keys are unwrapped, as keys.service_url of the gateways.")
    key_service_key: str = Field("matcher", description="As keys.service_key of the gateways.")
    key_service_token_file: Path | None = Field(None, description="File with the token for the key service.")
    key_service_ca_file: Path | None = Field(None, description="PEM of who vouches for the key service.")
    threads: int = Field(0, ge=0, description="Threads of a search; 0: all cores.")
    scanner: Literal["cpu", "gpu", "gpu-faiss"] | None = Field(
        None, description="What filters, as index.scanner of a gateway; not given: a GPU if the instance has one."
    )
    memory_bytes_max: int = Field(0, ge=0, description="Budget of the index; 0: 70% of the machine's memory.")
    segment_rows_max: int = Field(1_000_000, ge=1000, description="Rows at which a segment is sealed.")
    erase_within_h: float = Field(1.0, gt=0, le=24, description="Withdrawn rows leave memory and files within this.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error.")

    @model_validator(mode="after")
    def _consistent(self) -> ShardSettings:
        if bool(self.log_url.get_secret_value()) == (self.log_url_file is not None):
            raise ValueError("set either log_url or log_url_file")
        return self

    def keys(self) -> KeySettings:
        """How keys are unwrapped. Raises StartRefused."""
        try:
            return KeySettings(
                service_url=self.key_service_url,
                service_key=self.key_service_key,
                service_token_file=self.key_service_token_file,
                service_ca_file=self.key_service_ca_file,
            )  # type: ignore[call-arg]
        except ValidationError as invalid:
            raise StartRefused(invalid.errors()[0]["msg"], field="key_service_url") from invalid

    def address(self) -> str:
        """The log's address; read anew each time, since secrets are rotated. Raises StartRefused."""
        if self.log_url_file is None:
            return self.log_url.get_secret_value()
        try:
            return self.log_url_file.read_text("utf-8").strip()
        except OSError as error:
            raise StartRefused(f"cannot read {self.log_url_file}: {error.strerror}", field="log_url_file") from error


class UnsuspendedClock(SystemClock):
    """Its monotonic clock goes on while the machine is suspended: what was fresh before is not fresh after."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def load_settings(parameters: Mapping[str, str]) -> ShardSettings:
    """From a model's parameters and the environment. Raises StartRefused naming what is wrong."""
    given = {name: value for name, value in parameters.items() if value}
    try:
        return ShardSettings(**given)  # type: ignore[arg-type]
    except ValidationError as invalid:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in one['loc']) or 'parameters'}: {one['msg']}" for one in invalid.errors()
        )
        raise StartRefused(
            f"the shard's settings: {wrong}", hint="set the model's parameters or MATCHER_SHARD_* variables"
        ) from invalid


def open_shard(name: str, parameters: Mapping[str, str], gpu: str = "") -> HostedShard:
    """The shard `name` of a model with these parameters; it goes on opening after the return. `gpu` is that of the
    model's instance, such as cuda:0; "": it has none.

    Raises StartRefused if the settings make no sense.
    """
    settings = load_settings(parameters)
    _limit_arithmetic()
    logs.configure(settings.log_level)
    shard = HostedShard(name, _opening(name, settings, index_settings(settings, gpu)))
    interpreter.tune()
    return shard


def index_settings(settings: ShardSettings, gpu: str) -> IndexSettings:
    """Those of the engine; `gpu` as in `open_shard`."""
    return IndexSettings(  # type: ignore[call-arg]
        memory_bytes_max=settings.memory_bytes_max,
        segment_rows_max=settings.segment_rows_max,
        threads=settings.threads,
        scanner=settings.scanner or ("gpu" if gpu else "cpu"),
        gpu_devices=(gpu,) if gpu else (),
    )


def _opening(name: str, settings: ShardSettings, index: IndexSettings) -> Opening:
    clock = UnsuspendedClock()
    # Of these a shard that only reads uses nothing.
    storage = StorageSettings()  # type: ignore[call-arg]

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[FollowingShard, OpenLog]]:
        async with _locked(settings.data_dir):
            keyring = await asyncio.to_thread(Keyring.open, settings.keys_dir, settings.keys())
            keyring.require()
            shard = await FollowingShard.open(
                name,
                settings.data_dir / "shard",
                _key_of(keyring),
                index,
                clock,
                configured=parse(settings.partitions),
                erase_within_s=settings.erase_within_h * 3600,
            )

            @asynccontextmanager
            async def open_log() -> AsyncIterator[GalleryLog]:
                log = await open_postgres_log(settings.address(), keyring, storage, clock, read_only=True)
                try:
                    yield log
                finally:
                    await log.close()

            try:
                yield shard, open_log
            finally:
                await shard.close()

    return opened


@asynccontextmanager
async def _locked(data_dir: Path) -> AsyncIterator[None]:
    until = time.monotonic() + _LOCK_S_MAX
    while True:
        lock = process_lock.held(data_dir)
        try:
            lock.__enter__()
            break
        except StartRefused:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(_LOCK_RETRY_S)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _key_of(keyring: Keyring) -> Key:
    """A key that was destroyed is none; one that is merely not there must stop the opening, or the rows that it
    sealed would be taken for deleted."""

    def key(gallery_id: str, generation: int = 0) -> DataKey | None:
        try:
            return keyring.key(gallery_id, generation)
        except NotFound as missing:
            if keyring.destroyed(gallery_id):
                return None
            raise StartRefused(missing.detail, hint="mount the keys directory of the gateways") from missing

    return key


def _limit_arithmetic() -> None:
    """OpenBLAS keeps to one thread, as in a gateway's process: the scans share out the work themselves."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, "blas")
