"""The Python client that edge nodes use: arrays in, plain values out, over one gRPC address.

    async with MatcherClient("127.0.0.1:8081", token) as client:
        async for answer in client.identify_stream(messages):
            print(answer.decision.probe_id, answer.decision.outcome)

Streams reconnect by themselves, with exponential backoff and full jitter. At most
`in_flight_messages_max` messages are unanswered at a time; after a break they are sent again. Every probe
and every reference taken from the caller gets exactly one answer. A probe that is sent again after a break
may already have raised its alert: it is then found under the same alert id, and recorded once.
"""

from matcher_service.client.from_wire import identify_reply
from matcher_service.client.matcher_client import MatcherClient
from matcher_service.client.refusals import Unreachable, error_for, error_of
from matcher_service.client.values import (
    ProbeAnswer,
    Probes,
    ReceiptOutcome,
    Receipts,
    ReferenceReceipt,
    References,
    Tls,
    WatchGap,
    Withdrawal,
)
from matcher_service.windowed_stream import Backoff

__all__ = [
    "Backoff",
    "MatcherClient",
    "ProbeAnswer",
    "Probes",
    "ReceiptOutcome",
    "Receipts",
    "ReferenceReceipt",
    "References",
    "Tls",
    "Unreachable",
    "WatchGap",
    "Withdrawal",
    "error_for",
    "error_of",
    "identify_reply",
]
