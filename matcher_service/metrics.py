"""Every metric, named once. No label names a person, a probe, a reference or a camera.

Probes without a candidate touch only counters per outcome and unlabelled histograms.

`python -m matcher_service.metrics` prints them as the table of docs/METRICS.md.
"""

from __future__ import annotations

import sys

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase

# Edges stand on the service levels: a frame (40 ms), a tenth of a second, the default deadline (2 s).
LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
SCORE_BUCKETS = tuple(step / 20 for step in range(-4, 20))
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """One instance per process; tests give each its own registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.requests = Counter(
            "matcher_requests_total",
            "Requests by transport, verb and result (ok, or the cause of the refusal).",
            ("transport", "verb", "result"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "matcher_request_seconds",
            "From receipt of a request, or of a message of a stream, to its answer.",
            ("transport", "verb"),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.decisions = Counter(
            "matcher_decisions_total",
            "Probes answered, by outcome.",
            ("outcome",),
            registry=registry,
        )
        self.rejections = Counter(
            "matcher_rejections_total", "Probes rejected, by cause.", ("cause",), registry=registry
        )
        self.case_probes = Counter(
            "matcher_case_probes_total",
            "Probes of case searches answered, by kind of gallery searched.",
            ("kind",),
            registry=registry,
        )
        self.climbs = Counter(
            "matcher_climbs_total",
            "Credentials stopped because their candidates climbed on one subject.",
            registry=registry,
        )
        self.adjudications = Counter(
            "matcher_adjudications_total",
            "What people made of alerts, by verdict.",
            ("verdict",),
            registry=registry,
        )
        self.station_seconds = Histogram(
            "matcher_station_seconds",
            "Time spent in each station of a flow, per message or batch.",
            ("station",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.station_refusals = Counter(
            "matcher_station_refusals_total",
            "Messages or batches that ended at a station, by cause.",
            ("station", "cause"),
            registry=registry,
        )
        self.identify_seconds = Histogram(
            "matcher_identify_seconds",
            "From receipt of a message to its reply.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.refusal_seconds = Histogram(
            "matcher_refusal_seconds",
            "From receipt of a message of probes to its refusal by admission.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.batch_probes = Histogram(
            "matcher_batch_probes", "Probes of one search.", buckets=BATCH_BUCKETS, registry=registry
        )
        self.queue_probes = Gauge("matcher_queue_probes", "Admitted probes that wait for a batch.", registry=registry)
        self.queue_seconds = Histogram(
            "matcher_queue_seconds",
            "Time that a message waited for its batch.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.batches_in_flight = Gauge("matcher_batches_in_flight", "Searches under way.", registry=registry)
        self.batches_in_flight_max = Gauge(
            "matcher_batches_in_flight_max",
            "Searches begun at once, at most (batching.batches_in_flight_max).",
            registry=registry,
        )
        self.permits_in_use = Gauge(
            "matcher_permits_in_use", "Admission permits held, in probes or references.", ("flow",), registry=registry
        )
        self.permits_max = Gauge(
            "matcher_permits_max", "Admission permits in all, in probes or references.", ("flow",), registry=registry
        )
        self.best_score = Histogram(
            "matcher_best_score",
            "Best score of probes that raised no alert, one in watch.score_sample_every.",
            buckets=SCORE_BUCKETS,
            registry=registry,
        )
        self.score_drift = Gauge(
            "matcher_score_drift",
            "Largest distance between the distribution of the best scores of late and the calibrated one, 0 to 1.",
            registry=registry,
        )
        self.score_drift_suspected = Gauge(
            "matcher_score_drift_suspected", "1 if that distance is large and no chance, else 0.", registry=registry
        )
        self.references_live = Gauge(
            "matcher_references_live", "Searchable references.", ("gallery",), registry=registry
        )
        self.references_dead = Gauge(
            "matcher_references_dead", "Withdrawn rows not yet compacted away.", ("gallery",), registry=registry
        )
        self.log_sequence = Gauge("matcher_log_sequence", "Newest committed sequence.", registry=registry)
        self.applied_sequence = Gauge(
            "matcher_applied_sequence", "Sequence applied by this process's shards.", registry=registry
        )
        self.log_available = Gauge(
            "matcher_log_available",
            "1 if the gallery log was read and written when that was last tried, else 0.",
            registry=registry,
        )
        self.replay_lag_seconds = Gauge(
            "matcher_replay_lag_seconds",
            "Time since the shards last stood at the head of the log; 0 when they do.",
            registry=registry,
        )
        self.enrolled = Counter("matcher_enrolled_total", "References enrolled or replaced.", registry=registry)
        self.withdrawn = Counter("matcher_withdrawn_total", "References withdrawn.", registry=registry)
        self.erased = Counter("matcher_erased_total", "Templates physically erased from the log.", registry=registry)
        self.erasure_waiting = Gauge(
            "matcher_erasure_waiting",
            "Templates that wait in the log for their erasure, at the last look; those under a legal hold included.",
            registry=registry,
        )
        self.certificates = Counter(
            "matcher_certificates_total",
            "(probe, segment) pairs by how they were answered: certified by a bound, or scanned in full in float32.",
            ("how",),
            registry=registry,
        )
        self.replica_answers = Counter(
            "matcher_replica_answers_total",
            "Searches of a shard's replica by result: counted; stale (older than the freshness lease) or behind (the "
            "sequence required), which do not count; none (in time).",
            ("result",),
            registry=registry,
        )
        self.replica_fresh = Gauge(
            "matcher_replica_fresh",
            "1 while a replica answers and knew itself caught up within the freshness lease, else 0.",
            ("replica",),
            registry=registry,
        )
        self.replica_sequence = Gauge(
            "matcher_replica_sequence", "Sequence that a replica told last.", ("replica",), registry=registry
        )
        self.replica_index_bytes = Gauge(
            "matcher_replica_index_bytes",
            "Memory held by the index of a replica, as it told last.",
            ("replica",),
            registry=registry,
        )
        self.partitions_missing = Gauge(
            "matcher_partitions_missing",
            "Partitions, of 256, that no fresh replica holds: answers are incomplete while there are any.",
            registry=registry,
        )
        self.streams_open = Gauge("matcher_streams_open", "Open gRPC streams.", registry=registry)
        self.streams_max = Gauge("matcher_streams_max", "Streams at once (limits.streams_max).", registry=registry)
        self.gpu_working = Gauge(
            "matcher_gpu_working",
            "1: the GPU searches; 0: it failed, and the CPU searches its references until it is opened anew.",
            ("gpu",),
            registry=registry,
        )
        self.gpu_bytes = Gauge(
            "matcher_gpu_bytes", "Memory of the GPU that holds codes of references.", ("gpu",), registry=registry
        )
        self.gpu_budget_bytes = Gauge(
            "matcher_gpu_budget_bytes",
            "Memory of the GPU for codes; what does not fit is searched by the CPU.",
            ("gpu",),
            registry=registry,
        )
        self.segments = Gauge("matcher_segments", "Segments that a search has to go through.", registry=registry)
        self.index_bytes = Gauge("matcher_index_bytes", "Memory held by the index.", registry=registry)
        self.index_budget_bytes = Gauge(
            "matcher_index_budget_bytes",
            "Memory that the index may hold; beyond it enrolment stops.",
            registry=registry,
        )
        self.erasure_complete = Gauge(
            "matcher_erasure_complete_timestamp_seconds",
            "Unix time at which the log last held no template that was due for erasure; 0: not since the start.",
            registry=registry,
        )
        self.erasure_unreported = Gauge(
            "matcher_erasure_unreported_timestamp_seconds",
            "Unix time of the oldest erasure in the log that some store (database, memory or files of an index) has "
            "not reported; 0: there is none.",
            registry=registry,
        )
        self.erase_within_seconds = Gauge(
            "matcher_erase_within_seconds",
            "Withdrawn and expired templates are erased within this (storage.erase_within_h).",
            registry=registry,
        )
        self.audit_checkpoint = Gauge(
            "matcher_audit_checkpoint_timestamp_seconds",
            "Unix time at which a signed checkpoint last covered every audit record; 0: not since the start.",
            registry=registry,
        )
        self.audit_checkpoint_every_seconds = Gauge(
            "matcher_audit_checkpoint_every_seconds",
            "A checkpoint is made this often (storage.audit_checkpoint_every_s).",
            registry=registry,
        )
        self.ready = Gauge("matcher_ready", "1 while /readyz answers 200, else 0.", registry=registry)
        self.data_free_bytes = Gauge(
            "matcher_data_free_bytes", "Free space of the file system of storage.data_dir.", registry=registry
        )
        self.data_size_bytes = Gauge(
            "matcher_data_size_bytes", "Size of the file system of storage.data_dir.", registry=registry
        )
        self.certificate_expiry = Gauge(
            "matcher_certificate_expiry_timestamp_seconds",
            "Unix time at which the TLS certificate read at the start expires; 0: no TLS.",
            registry=registry,
        )
        self.build = Info(
            "matcher_build",
            "Versions of the service, its policy and its interpreter, and its form (embedded or cluster).",
            registry=registry,
        )


def sample_name(metric: MetricWrapperBase) -> str:
    """The name that a query uses: counters end in _total, an info in _info."""
    family = next(iter(metric.describe()))
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def table() -> str:
    """Every metric as a Markdown table, in the order of their declaration."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in vars(Metrics(CollectorRegistry())).values():
        if isinstance(metric, MetricWrapperBase):
            family = next(iter(metric.describe()))
            labels = ", ".join(f"`{one}`" for one in metric._labelnames)
            rows.append(f"| `{sample_name(metric)}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
