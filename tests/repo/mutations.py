"""Takes enforcements out of a copy of the code, one at a time: `python -m tests.repo.mutations [NAME ...]`.

For each, the test that docs/ACCOUNTABILITY.md names must fail; one that passes all the same proves nothing. Exits 1 if
there is such a test, or if a mutation no longer fits the code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("matcher_service", "tests", "pyproject.toml")
LIMIT_S = 180


class Mutation(NamedTuple):
    """`old` stands once in `file` (below matcher_service) and becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    test: str


MATRIX = "tests/flow/test_access_matrix.py"
EDGES = "tests/flow/test_edge_credentials.py"
LAWFUL = "tests/flow/test_lawful_references.py"
RIGHTS = "tests/flow/test_rights.py"
ALERTS = "tests/flow/test_alerts.py"
EVIDENCE = "tests/unit/test_evidence.py"
TARGETS = "tests/flow/test_threshold_by_target.py"

MUTATIONS = (
    Mutation(
        "scopes over HTTP",
        "gateway/http_guard.py",
        'verbs.require(actor, request.scope["route"].name, verbs.HTTP_VERBS)',
        "pass",
        f"{MATRIX}::test_every_endpoint_as_every_role_on_own_and_foreign_objects",
    ),
    Mutation(
        "scopes over gRPC",
        "gateway/grpc.py",
        "verbs.require(actor, verb, verbs.GRPC_VERBS)",
        "pass",
        f"{MATRIX}::test_every_rpc_as_every_role_on_own_and_foreign_objects",
    ),
    Mutation(
        "thresholds beyond the calibration",
        "evidence.py",
        "if threshold > table.scores[-1]:",
        "if False:",
        f"{EVIDENCE}::test_what_the_calibration_does_not_bear_out_is_said",
    ),
    Mutation(
        "evidence kept with a threshold",
        "enrol.py",
        "write = evidence.settled(write, self._catalogue)",
        "pass",
        f"{TARGETS}::test_the_commands_say_what_is_known_of_a_threshold_and_an_officer_sees_it_with_the_approval",
    ),
    Mutation(
        "rights over galleries",
        "terms.py",
        "return self.galleries is None or gallery_id in self.galleries",
        "return True",
        f"{MATRIX}::test_every_endpoint_as_every_role_on_own_and_foreign_objects",
    ),
    Mutation(
        "the end of a stolen node's streams",
        "gateway/grpc.py",
        "stream.cut(refusal)",
        "pass",
        f"{EDGES}::test_law_11_revocation_ends_open_and_idle_streams_and_tokens_within_a_second",
    ),
    Mutation(
        "revocation",
        "access/standing.py",
        "if credential.revoked_at_ms is not None and now_ms >= credential.revoked_at_ms:",
        "if False:",
        f"{EDGES}::test_law_11_revocation_ends_open_and_idle_streams_and_tokens_within_a_second",
    ),
    Mutation(
        "cameras",
        "policy.py",
        "if cameras and message.camera_id not in cameras:",
        "if False:",
        f"{EDGES}::test_deployments_are_bound_to_their_cameras",
    ),
    Mutation(
        "replays",
        "access/sequences.py",
        "if -ahead >= WINDOW or window.seen >> -ahead & 1:",
        "if False:",
        f"{EDGES}::test_a_message_that_is_sent_twice_is_accepted_once",
    ),
    Mutation(
        "two persons",
        "change_policy.py",
        "if not actor.person or actor.person == proposal.proposed_by:",
        "if False:",
        f"{MATRIX}::test_by_hand_a_threshold_is_two_persons_business",
    ),
    Mutation(
        "audience",
        "access/people.py",
        'if settings.oidc_audience not in _texts(claims.get("aud")):',
        "if False:",
        "tests/unit/test_access_people.py::test_a_token_with_one_fault_opens_nothing_and_says_why",
    ),
    Mutation(
        "custody first",
        "access/conduct.py",
        "if GalleryKind.CUSTODY in kinds or not await self._case_use.searched_custody(case_reference):",
        "if False:",
        "tests/flow/test_authority.py::"
        "test_custody_is_searched_first_and_immigration_only_when_asked_and_counted_apart",
    ),
    Mutation(
        "the limit of a case after a restart",
        "gallery/case_use.py",
        "used = {name: _left(_counters(connection, name), at_ms, per_h) for name in names}",
        "used = dict.fromkeys(names, 0)",
        "tests/flow/test_authority.py::test_searching_everyone_is_more_than_a_case_allows",
    ),
    Mutation(
        "bands",
        "access/bands.py",
        "return Scope.RAW_SCORES in actor.scopes",
        "return True",
        f"{EDGES}::test_scores_are_bands_unless_the_scope_says_otherwise",
    ),
    Mutation(
        "climbs",
        "access/climbing.py",
        "self._cooling[credential] = now + COOL_DOWN_S",
        "pass",
        f"{EDGES}::test_a_climb_is_stopped_audited_and_counted",
    ),
    Mutation(
        "approval of a watchlist",
        "lawful_galleries.py",
        "if gallery.kind is GalleryKind.WATCHLIST and (gallery.watchlist is None or not",
        "if False and (gallery.watchlist is None or not",
        f"{LAWFUL}::test_a_watchlist_is_searched_only_when_another_person_than_its_author_approved_it",
    ),
    Mutation(
        "review dates",
        "grounds.py",
        "np.minimum(expires, np.where(given, review_by_ms, _FOR_EVER))",
        "expires",
        f"{LAWFUL}::test_a_reference_whose_review_is_overdue_stops_being_searched_by_itself_and_is_erased",
    ),
    Mutation(
        "destruction of a watchlist",
        "gallery/lawful.py",
        "if one.watchlist and one.watchlist.deployment_id == deployment_id)",
        "if False)",
        f"{LAWFUL}::test_a_watchlist_is_destroyed_with_its_deployment",
    ),
    Mutation(
        "the impostor check",
        "resemblance.py",
        "if count > gallery.resembles_max:",
        "if False:",
        f"{LAWFUL}::test_a_reference_that_resembles_too_many_others_does_not_enter",
    ),
    Mutation(
        "two adjudicators",
        "adjudication.py",
        "if len(last) < persons:",
        "if not last:",
        "tests/flow/test_alerts.py::test_where_two_people_are_asked_for_one_cannot_settle_an_alert",
    ),
    Mutation(
        "legal holds",
        "gallery/erase.py",
        ".where(~is_held())",
        "",
        f"{RIGHTS}::test_a_legal_hold_pauses_erasure_and_never_restores_searchability",
    ),
    Mutation(
        "templates are let go of",
        "batching.py",
        "            del batch\n",
        "",
        "tests/unit/test_batching.py::"
        "test_law_6_templates_are_let_go_of_with_the_answer_and_not_when_the_next_batch_comes",
    ),
    Mutation(
        "holds over alerts",
        "gallery/held.py",
        "return isinstance(candidates, list | tuple) and any(hold.covers(one) for one in candidates)",
        "return False",
        f"{RIGHTS}::test_a_legal_hold_keeps_alerts_and_what_the_audit_tells_and_puts_neither_to_use",
    ),
    Mutation(
        "holds over details",
        "gallery/held.py",
        "if any(_is_about(connection, one, first, last) for first, last in spans):",
        "if False:",
        f"{RIGHTS}::test_details_that_name_a_person_or_tell_of_their_references_are_kept_under_a_hold",
    ),
    Mutation(
        "what is kept is out of use",
        "gallery/alert_records.py",
        "alert.c.alert_id == alert_id, alert.c.erase_at_ms > now_ms)",
        "alert.c.alert_id == alert_id)",
        f"{RIGHTS}::test_a_legal_hold_keeps_alerts_and_what_the_audit_tells_and_puts_neither_to_use",
    ),
    Mutation(
        "a deployment's lifetime of alerts",
        "gallery/transaction.py",
        "self.state.alert_retention_ms.get(one.deployment_id, self.terms.alert_retention_ms)",
        "self.terms.alert_retention_ms",
        f"{ALERTS}::test_an_alert_lives_as_long_as_its_deployment_says_and_no_setting_lengthens_it",
    ),
    Mutation(
        "single proofs",
        "audit_proofs.py",
        "if not proves:",
        "if False:",
        "tests/flow/test_audit_proofs.py::test_a_single_proof_is_checked_without_the_service_and_shows_nothing_else",
    ),
    Mutation(
        "the erasure ledger",
        "gallery/log.py",
        "if newest <= self._head:",
        "if True:",
        f"{RIGHTS}::test_a_restored_database_does_not_bring_back_who_was_withdrawn_since",
    ),
    Mutation(
        "the checkpoint kept elsewhere",
        "audit_proofs.py",
        "if kept is not None and not export.kept_met:",
        "if False:",
        "tests/flow/test_audit_proofs.py::"
        "test_only_a_checkpoint_kept_elsewhere_shows_that_the_service_itself_rewrote_its_past",
    ),
    Mutation(
        "consultations on record",
        "gateway/http_references.py",
        "await service.log.record([AuditEvent(actor.name, action, subject, detail)], [])",
        "pass",
        f"{RIGHTS}::test_a_subject_gets_everything_that_is_held_of_them_and_it_is_audited",
    ),
    Mutation(
        "the wait for every index",
        "gallery/erasure_receipts.py",
        "row.kind != ErasedKind.TEMPLATES or indexes.keys() <= told.keys()",
        "True",
        "tests/flow/test_erasure_receipts.py::test_a_receipt_waits_for_an_index_that_has_not_reported",
    ),
    Mutation(
        "the keys that backups need",
        "gallery/resealing.py",
        "keep_ms = 0 if backups_too else transaction.terms.backups_destroyed_within_ms",
        "keep_ms = 0",
        "tests/contract/test_key_rotation.py::test_the_old_key_waits_for_backups_and_for_every_index",
    ),
)


@contextmanager
def mutated(mutation: Mutation) -> Iterator[Path]:
    """A copy of the code without the enforcement. Raises ValueError if the mutation does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        file = copy / "matcher_service" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.name}: {mutation.file} holds {text.count(mutation.old)} of {mutation.old!r}")
        file.write_text(text.replace(mutation.old, mutation.new))
        yield copy


def noticed(mutation: Mutation) -> bool:
    """Whether the test fails without the enforcement; raises ValueError if it did not even run."""
    with mutated(mutation) as copy:
        # The copy's own package must be found before the installed one.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
        try:
            ran = subprocess.run(
                command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_S, env=_environment(copy)
            )
        except subprocess.TimeoutExpired:
            return True  # it waits for ever for what no longer happens
    if ran.returncode not in (0, 1):
        raise ValueError(f"{mutation.name}: the test did not run: {ran.stdout[-2000:]}{ran.stderr[-1000:]}")
    return ran.returncode == 1


def _environment(copy: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(copy)}


def main(names: Sequence[str]) -> int:
    unnoticed = 0
    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        seen = noticed(mutation)
        unnoticed += not seen
        print(f"{'noticed' if seen else 'NOT NOTICED':12} {mutation.name}: {mutation.test}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
