"""Law 7: the audit is a chain in which any change is found, and details can be erased without breaking it."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service import audit
from matcher_service.errors import DataDamaged

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
DETAILS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), JSON, max_size=4)


def chain(details: list[dict[str, object]]) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    previous = audit.CHAIN_START
    for index, detail in enumerate(details, 1):
        salt = index.to_bytes(audit.SALT_BYTES, "big") if detail else b""
        digest = audit.detail_digest(salt, audit.canonical_detail(detail))
        record = audit.chained(
            index=index, at_ms=index, actor="a", action="b", subject="c", facts={"n": index}, digest=digest,
            previous=previous,
        )  # fmt: skip
        previous = str(record["hash"])
        made.append({**record, "salt": salt.hex() if detail else None, "detail": detail or None})
    return made


def test_a_hash_is_sha_256_of_a_zero_byte_and_the_canonical_json() -> None:
    """RFC 6962's leaf, computed here without the code under test."""
    record = chain([{}])[0]
    fields = {name: record[name] for name in audit.CHAINED}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert record["hash"] == hashlib.sha256(b"\0" + text.encode()).hexdigest()
    assert record["previous"] == "0" * 64


@given(st.lists(DETAILS, max_size=4))
def test_a_chain_verifies_also_after_storage_and_after_details_were_erased(details: list[dict[str, object]]) -> None:
    made = chain(details)
    stored = json.loads(json.dumps(made))
    assert audit.verify(stored) == audit.verify(made)
    erased = [{**record, "salt": None, "detail": None} for record in made]
    assert audit.verify(erased) == (len(made), made[-1]["hash"] if made else audit.CHAIN_START)


@given(st.lists(DETAILS, min_size=2, max_size=4), st.data())
def test_any_change_to_any_record_is_found(details: list[dict[str, object]], data: st.DataObject) -> None:
    made = chain(details)
    at = data.draw(st.integers(0, len(made) - 1))
    name = data.draw(st.sampled_from([*audit.CHAINED, "hash"]))
    value = data.draw(JSON.filter(lambda value: audit.canonical(value) != audit.canonical(made[at][name])))
    forged = [*made]
    forged[at] = {**made[at], name: value}
    with pytest.raises(DataDamaged, match=f"audit record {at + 1}:"):
        audit.verify(forged)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2], [1, 2], [0, 0, 1, 2], [0, 1, 1, 2]])
def test_records_dropped_repeated_or_moved_are_found(order: list[int]) -> None:
    made = chain([{"a": 1}, {}, {"b": 2}])
    with pytest.raises(DataDamaged):
        audit.verify([made[at] for at in order])


def test_a_record_rehashed_after_a_change_breaks_the_one_after_it() -> None:
    made = chain([{}, {}, {}])
    made[1]["actor"] = "forger"
    made[1]["hash"] = audit.leaf_hash(made[1])
    with pytest.raises(DataDamaged, match="audit record 3:"):
        audit.verify(made)


def test_an_exchanged_detail_is_found() -> None:
    made = chain([{"who": "s-1"}])
    made[0]["detail"] = {"who": "s-2"}
    with pytest.raises(DataDamaged, match="detail"):
        audit.verify(made)


def test_a_record_without_a_field_is_found() -> None:
    made = chain([{}])
    del made[0]["facts"]
    with pytest.raises(DataDamaged, match="lacks a field"):
        audit.verify(made)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, b"bytes"])
def test_what_json_cannot_carry_has_no_canonical_form(value: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        audit.canonical({"a": value})


def test_equal_details_have_unequal_digests_under_unequal_salts() -> None:
    assert audit.detail_digest(b"1", b"{}") != audit.detail_digest(b"2", b"{}")
    assert audit.detail_digest(b"", b"") == ""


def test_keys_that_are_no_strings_take_their_final_order() -> None:
    detail = {10: "a", 9: "b"}
    text = audit.canonical_detail(detail)  # type: ignore[arg-type]
    assert text == audit.canonical(json.loads(text)) == b'{"10":"a","9":"b"}'
