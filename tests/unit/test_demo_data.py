"""Who is enrolled, who is searched for, and that neither knows of the other."""

from __future__ import annotations

import numpy as np

from matcher_service.demo.data import GALLERY_SUBJECTS, enrolment, is_mated, load_faces, probes


def test_the_galleries_hold_shots_1_to_5_of_subjects_1_to_35() -> None:
    """Custody: subjects 1 to 30; immigration: 31 to 35; five shots each."""
    faces = load_faces()
    for gallery_id, first, last in (("custody", 1, 30), ("immigration", 31, 35)):
        held = enrolment(faces, gallery_id)
        assert sorted(set(held.subjects.tolist())) == list(range(first, last + 1))
        assert sorted(held.row_ids) == sorted(
            f"orl-s{subject:02d}-{shot:02d}" for subject in range(first, last + 1) for shot in range(1, 6)
        )
    assert set(GALLERY_SUBJECTS) == {"custody", "immigration"}
    assert len(enrolment(faces)) == 175


def test_the_probes_are_the_other_shots_of_all_40_subjects() -> None:
    """200 probes, 25 of them of people who are enrolled nowhere; no template is both enrolled and searched for."""
    faces = load_faces()
    searched = probes(faces)
    assert len(searched) == 200
    assert set(searched.shots.tolist()) == {6, 7, 8, 9, 10}
    assert set(searched.subjects.tolist()) == set(range(1, 41))
    assert sorted(set(searched.subjects[~is_mated(searched)].tolist())) == [36, 37, 38, 39, 40]
    assert not set(searched.row_ids) & set(enrolment(faces).row_ids)
    stacked = np.concatenate([searched.templates, enrolment(faces).templates])
    assert len(np.unique(stacked, axis=0)) == len(stacked)


def test_neighbours_in_the_stream_are_different_people() -> None:
    """A frame of four shows four people."""
    subjects = probes(load_faces()).subjects
    assert all(len(set(subjects[start : start + 4].tolist())) == 4 for start in range(0, len(subjects), 4))
