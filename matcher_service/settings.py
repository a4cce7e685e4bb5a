"""Settings: frozen sections, units in the names, checked together at start.

Read from a TOML file (`matcher serve --config matcher.toml`) and from the environment, where
`MATCHER_SERVER__HTTP_PORT=8090` stands for `[server] http_port`. The environment wins.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from matcher_service.errors import StartRefused
from matcher_service.terms import Scope

# What a person's roles can open: an edge node is no person, and an exchange is not a role.
_GRANTABLE = frozenset(Scope) - {Scope.EDGE, Scope.TOKEN_EXCHANGE}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(Section):
    host: str = Field("127.0.0.1", description="Address of both listeners; beyond loopback TLS is required.")
    http_port: int = Field(8080, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    grpc_port: int = Field(8081, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    tls_certificate_file: Path | None = Field(None, description="PEM certificate chain of the service.")
    tls_key_file: Path | None = Field(None, description="PEM private key of the service.")
    tls_client_ca_file: Path | None = Field(
        None, description="PEM authority of client certificates; set: every gRPC caller must show one (mutual TLS)."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Own port of /metrics beyond loopback; 0: none.")
    metrics_host: str = Field("127.0.0.1", description="Address of that port.")
    share_ports: bool = Field(
        False, description="Several gateways of a cluster listen on these ports of one machine, each with its metrics."
    )
    drain_s_max: float = Field(20.0, gt=0, description="Longest wait for admitted work at shutdown.")


class StorageSettings(Section):
    data_dir: Path = Field(Path("data"), description="Directory of this process alone: log, keys, segments.")
    keys_dir: Path | None = Field(None, description="Where keys live; default: data_dir/keys. Keep out of backups.")
    idempotency_window_h: float = Field(24.0, gt=0, le=24 * 31, description="How long an enrolment key is remembered.")
    erase_within_h: float = Field(
        1.0, gt=0, le=24, description="Templates of withdrawn and expired references are erased within this."
    )
    audit_checkpoint_every_s: float = Field(
        60.0, gt=0, le=3600, description="A signed checkpoint of the audit is made this often, if anything was added."
    )
    alert_retention_d: float = Field(
        31.0, gt=0, le=365, description="Lifetime of an alert, where its deployment says none."
    )
    backups_destroyed_within_d: float = Field(
        92.0,
        gt=0,
        le=366,
        description="Age at which a backup of the log is destroyed; the erasure ledger reaches back so far.",
    )
    audit_detail_retention_d: float = Field(
        731.0, gt=0, le=2192, description="After this the personal detail beside an audit record is erased."
    )


class KeySettings(Section):
    wrapped_by: Literal["file", "service"] = Field(
        "file", description="What wraps the keys of galleries: the file master.key of keys_dir, or a key service."
    )
    service_url: str = Field(
        "",
        description="Key service as Vault's transit engine, like https://vault:8200/v1/transit; https past loopback.",
    )
    service_key: str = Field(
        "matcher", pattern=r"^[\w.-]+$", description="Name of the key service's key that wraps those of galleries."
    )
    service_token_file: Path | None = Field(None, description="File with the token (X-Vault-Token); read each time.")
    service_ca_file: Path | None = Field(None, description="PEM of who vouches for it; default: the system's.")
    service_answers_within_s: float = Field(
        2.0, gt=0, le=4, description="Longest wait for the key service; every write may wait behind it."
    )

    @model_validator(mode="after")
    def _consistent(self) -> KeySettings:
        if not self.service_url:
            if self.wrapped_by == "service":
                raise ValueError("keys.service_url is not set: name the key service")
            return self
        parts = urlsplit(self.service_url)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError("keys.service_url must be https: a key that comes in clear can be anybody's")
        return self


class LimitSettings(Section):
    probes_per_message_max: int = Field(1024, ge=1, le=4096, description="Probes of one message.")
    references_per_message_max: int = Field(4096, ge=1, le=10_000, description="References of one message.")
    message_bytes_max: int = Field(
        8 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="Bytes of a gRPC message or an HTTP body."
    )
    rank_max_max: int = Field(100, ge=1, le=1000, description="Largest rank_max a request may ask for.")
    id_bytes_max: int = Field(128, ge=8, le=1024, description="Longest identifier, in UTF-8 bytes.")
    dimension_max: int = Field(4096, ge=2, le=16384, description="Largest dimension of a template space.")
    deadline_ms_default: int = Field(2000, ge=1, description="Deadline of a request that names none.")
    deadline_ms_max: int = Field(60_000, ge=1, description="Longest deadline a request may ask for.")
    stream_messages_in_flight_max: int = Field(16, ge=1, le=1024, description="Unanswered messages of one stream.")
    messages_in_flight_max: int = Field(
        256,
        ge=1,
        le=65_536,
        description="Messages of all streams that are worked on; what comes above waits with its sender.",
    )
    streams_max: int = Field(256, ge=1, description="Open streams at once.")


class AdmissionSettings(Section):
    probes_in_flight_max: int = Field(8192, ge=1, description="Permits in all, in probes.")
    probes_in_flight_per_credential_max: int = Field(
        4096,
        ge=1,
        description="Permits of one credential: not all, so that no edge node shuts out the rest.",
    )
    references_in_flight_max: int = Field(65_536, ge=1, description="References being enrolled at once.")


class BatchingSettings(Section):
    batch_probes_max: int = Field(256, ge=1, le=4096, description="Probes of one search.")
    batches_in_flight_max: int = Field(
        3,
        ge=1,
        le=64,
        description="Searches begun at once: two are worked on, one is on its way or waits for a thread.",
    )


class IndexSettings(Section):
    memory_bytes_max: int = Field(0, ge=0, description="Budget of the index; 0: 70% of the machine's memory.")
    segment_rows_max: int = Field(1_000_000, ge=1000, description="Rows at which a segment is sealed.")
    threads: int = Field(0, ge=0, description="Threads of a search; 0: all cores.")
    scanner: Literal["cpu", "gpu", "gpu-faiss"] = Field(
        "cpu", description="What filters: the CPU, a GPU's int8 kernel, or FAISS on a GPU where that cannot run."
    )
    gpu_devices: tuple[str, ...] = Field((), description="Which GPUs, like cuda:0; empty: all of the machine.")
    gpu_bytes_max: int = Field(0, ge=0, description="Memory of each GPU for codes; 0: 90% of what is free at start.")


class AccessSettings(Section):
    oidc_issuer: str = Field("", description="Issuer (iss) of persons' tokens; empty: persons have no way in.")
    oidc_audience: str = Field("", description="What aud of a person's token must name.")
    oidc_jwks_file: Path | None = Field(None, description="The issuer's public keys (JWKS) as a file; this or the URL.")
    oidc_jwks_url: str = Field("", description="Where the issuer's public keys (JWKS) are; https beyond loopback.")
    oidc_algorithms: tuple[str, ...] = Field(("RS256", "ES256"), description="Signatures accepted; asymmetric only.")
    oidc_leeway_s: float = Field(30.0, ge=0, le=300, description="How far the issuer's clock may be off.")
    oidc_lifetime_s_max: float = Field(3600.0, gt=0, le=86_400, description="A person's token may live this long.")
    oidc_roles_claim: str = Field("roles", description="Claim with a person's roles; a path such as a.b.")
    oidc_roles: dict[str, tuple[str, ...]] = Field(
        {},
        description="Scopes of a role of the issuer; a role that is not named here stands for the scope of its name.",
    )
    oidc_galleries_claim: str = Field(
        "galleries", description="Claim with the galleries a person has rights over; * for all, without it none."
    )
    person_probes_per_s_max: int = Field(100, ge=1, description="Probes of one person per second.")
    edge_token_s: int = Field(900, ge=30, le=3600, description="Lifetime of a token that an edge credential is given.")
    case_probes_per_h_max: int = Field(
        2000, ge=1, le=100_000, description="Probes of one case, and of one credential under cases, in an hour."
    )


class WatchSettings(Section):
    score_sample_every: int = Field(
        1000, ge=0, description="One live probe in so many has its best score counted, to see drift; 0: none."
    )


class TraceSettings(Section):
    otlp_endpoint: str = Field(
        "", description="Where traces go, like http://127.0.0.1:4318/v1/traces (OTLP over HTTP); empty: none are made."
    )
    share: float = Field(0.01, ge=0, le=1, description="Share of messages traced that no caller traces.")


class EmbedderSettings(Section):
    card: str = Field("", description="Model card: dlib-resnet29, or the path of a card file; empty: no /v1/templates.")
    files_dir: Path | None = Field(None, description="Folder with the card's files; default: the package of the extra.")
    triton_endpoints: tuple[str, ...] = Field(
        (), description="host:port of Triton servers with face_embedder; empty: a process beside the service."
    )


class TritonSettings(Section):
    ca_file: Path | None = Field(
        None, description="PEM authorities of the Triton servers' certificates; with it gateways speak TLS to them."
    )
    certificate_file: Path | None = Field(
        None, description="PEM certificate chain that a gateway shows to Triton servers which ask for one."
    )
    key_file: Path | None = Field(None, description="PEM private key of certificate_file.")


class ClusterSettings(Section):
    log_url: SecretStr = Field(
        SecretStr(""), description="postgresql://user:password@host/database of the gallery log; empty: no cluster."
    )
    shards: tuple[tuple[str, ...], ...] = Field(
        (), description="Per shard the host:port[/model] of its replicas on Triton, the model being gallery_shard."
    )
    models: tuple[str, ...] = Field(
        (), description="host:port of Triton servers with template_adapter and score_calibrator; empty: in process."
    )
    hedge_after_ms: int = Field(
        100, ge=1, description="A replica that has not answered by then has another one of its shard asked as well."
    )
    answer_within_ms: int = Field(
        1000, ge=10, description="Longest wait for a shard; then its partitions are named as missing."
    )

    @property
    def on(self) -> bool:
        return bool(self.log_url.get_secret_value())


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="MATCHER_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    server: ServerSettings = ServerSettings()  # type: ignore[call-arg]
    storage: StorageSettings = StorageSettings()  # type: ignore[call-arg]
    keys: KeySettings = KeySettings()  # type: ignore[call-arg]
    limits: LimitSettings = LimitSettings()  # type: ignore[call-arg]
    admission: AdmissionSettings = AdmissionSettings()  # type: ignore[call-arg]
    batching: BatchingSettings = BatchingSettings()  # type: ignore[call-arg]
    index: IndexSettings = IndexSettings()  # type: ignore[call-arg]
    watch: WatchSettings = WatchSettings()  # type: ignore[call-arg]
    traces: TraceSettings = TraceSettings()  # type: ignore[call-arg]
    embedder: EmbedderSettings = EmbedderSettings()  # type: ignore[call-arg]
    access: AccessSettings = AccessSettings()  # type: ignore[call-arg]
    triton: TritonSettings = TritonSettings()  # type: ignore[call-arg]
    cluster: ClusterSettings = ClusterSettings()  # type: ignore[call-arg]
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        server, limits = self.server, self.limits
        if (server.tls_certificate_file is None) != (server.tls_key_file is None):
            raise ValueError("server: tls_certificate_file and tls_key_file must be set together")
        if server.tls_client_ca_file is not None and server.tls_certificate_file is None:
            raise ValueError("server: tls_client_ca_file needs tls_certificate_file and tls_key_file")
        triton = self.triton
        if (triton.certificate_file is None) != (triton.key_file is None):
            raise ValueError("triton: certificate_file and key_file must be set together")
        if triton.certificate_file is not None and triton.ca_file is None:
            raise ValueError("triton: certificate_file needs ca_file, by which the servers are recognised")
        _judge_access(self.access)
        if not is_loopback(server.host) and server.tls_certificate_file is None:
            raise ValueError(
                f"server.host {server.host} is not loopback: set tls_certificate_file and tls_key_file, "
                "or listen on 127.0.0.1"
            )
        if limits.deadline_ms_default > limits.deadline_ms_max:
            raise ValueError("limits: deadline_ms_default exceeds deadline_ms_max")
        if limits.probes_per_message_max > self.admission.probes_in_flight_per_credential_max:
            raise ValueError(
                "admission.probes_in_flight_per_credential_max is below limits.probes_per_message_max: "
                "a full message could never be admitted"
            )
        if self.admission.probes_in_flight_per_credential_max > self.admission.probes_in_flight_max:
            raise ValueError("admission: the permits of one credential exceed those in all")
        self._consistent_cluster()
        return self

    def _consistent_cluster(self) -> None:
        cluster = self.cluster
        if not cluster.on:
            if cluster.shards or cluster.models:
                raise ValueError("cluster.log_url is not set: the shards of a cluster follow a log in PostgreSQL")
            if self.server.share_ports:
                raise ValueError("server.share_ports is for the gateways of a cluster: set cluster.log_url")
            return
        if not cluster.log_url.get_secret_value().startswith("postgresql://"):
            raise ValueError("cluster.log_url: not a postgresql:// address")
        if not cluster.shards or not all(cluster.shards):
            raise ValueError('cluster.shards: name at least one replica of each shard, [["host:port"], ...]')
        replicas = [one for shard in cluster.shards for one in shard]
        twice = {one for one in replicas if replicas.count(one) > 1}
        if twice:
            raise ValueError(f"cluster.shards: {', '.join(sorted(twice))} is named twice")
        for one in replicas:
            # Each by itself: what answers behind one name for several could not be told apart (law 5).
            if not re.fullmatch(r"[^/\s]+:\d+(/[^/\s]+)?", one):
                raise ValueError(f"cluster.shards: {one!r} is neither host:port nor host:port/model")
        if cluster.hedge_after_ms >= cluster.answer_within_ms:
            raise ValueError("cluster.hedge_after_ms is not below answer_within_ms: no other replica would be asked")
        if cluster.answer_within_ms >= self.limits.deadline_ms_default:
            raise ValueError(
                "cluster.answer_within_ms is not below limits.deadline_ms_default: with a shard gone, probes would be "
                "refused for their deadline instead of answered with what is missing"
            )
        if self.storage.keys_dir is None:
            raise ValueError("storage.keys_dir is not set: gateways and shards need one directory of keys in common")
        if self.server.share_ports and not (
            self.server.http_port and self.server.grpc_port and self.server.metrics_port
        ):
            raise ValueError("server.share_ports: name http_port and grpc_port, and a metrics_port of its own for each")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = settings_cls.model_config.get("toml_file")
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls)) if toml else sources

    @property
    def keys_dir(self) -> Path:
        return self.storage.keys_dir or self.storage.data_dir / "keys"


_ASYMMETRIC = frozenset(
    ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
)


def _judge_access(access: AccessSettings) -> None:
    if not access.oidc_algorithms or not set(access.oidc_algorithms) <= _ASYMMETRIC:
        raise ValueError(f"access.oidc_algorithms: name some of {', '.join(sorted(_ASYMMETRIC))}")
    for role, scopes in access.oidc_roles.items():
        if not set(scopes) <= _GRANTABLE:
            raise ValueError(f"access.oidc_roles: role {role!r} may open {', '.join(sorted(_GRANTABLE))}")
    if not access.oidc_issuer:
        return
    if not access.oidc_audience:
        raise ValueError("access.oidc_audience is empty: tokens for any service of the issuer would open this one")
    if (access.oidc_jwks_file is None) == (not access.oidc_jwks_url):
        raise ValueError("access: set one of oidc_jwks_file and oidc_jwks_url")
    if access.oidc_jwks_url:
        parts = urlsplit(access.oidc_jwks_url)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError("access.oidc_jwks_url must be https: keys that come in clear can be anybody's")


def is_loopback(host: str) -> bool:
    """True for 127.0.0.0/8, ::1 and localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(config_file: Path | None = None, **overrides: Any) -> Settings:
    """Settings from the file, the environment and overrides; raises StartRefused naming each bad field."""
    if config_file is not None and not config_file.is_file():
        raise StartRefused(f"no settings file at {config_file}", hint="check the path given to --config")

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=config_file)

    try:
        return FromFile(**overrides) if config_file else Settings(**overrides)
    except ValidationError as invalid:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in one['loc']) or 'settings'}: {one['msg']}" for one in invalid.errors()
        )
        raise StartRefused(wrong, hint="see `matcher settings` for every setting and its meaning") from invalid
