"""Records of finished runs: those that are published can be read, and count as done for what they were made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutelage.errors import TutelageError
from tutelage.reporting.charts import short
from tutelage.study.records import kept_record
from tutelage.study.results_table import counts_in, read_record
from tutelage.study.study_charts import NAME

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
RECORDS = sorted(PUBLISHED.rglob("*-budget-*-seed-*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_published_results_can_be_read(path):
    """Every published record of a study can be read by the study's page."""
    record = read_record(path)
    assert record is not None
    assert len(counts_in(record)) == record["test_images"]


def test_names_of_variants_stay_apart():
    """Names that are too long for a chart are cut in the middle, so that variants of one method can be told apart."""
    cut = [short(f"agnostic-oriented:{label}", NAME) for label in ("contrastive", "cosine")]
    assert cut == ["agnostic…trastive", "agnostic…d:cosine"]


def test_a_record_counts_for_the_settings_that_it_was_made_with(tmp_path):
    """Given the same settings a run counts as done, whatever a setting says that its task does not read; with any other it is refused."""
    published = PUBLISHED / "compare" / "fashion" / "task-oriented-budget-10-seed-0.json"
    record = json.loads(published.read_text())
    made = {
        **record["settings"],
        "task": "classification",
        "decoder": "lraspp",
        "feature_weight": 2.0,
        "committee": "auto",
    }
    (tmp_path / published.name).write_text(json.dumps({**record, "settings": made}))
    for same in ({}, {"decoder": "fpn"}, {"device": "cuda"}, {"preset": "none"}):
        assert kept_record(tmp_path, "task-oriented", 10, 0, {**made, **same}) is not None
    assert kept_record(tmp_path, "task-oriented", 10, 1, made) is None
    for other, told in (
        ({"feature_weight": 1.0}, "feature_weight: 2.0 -> 1.0"), ({"task": "segmentation"}, "task: classification -> segmentation"),
        ({"label_share": 0.0}, "label_share: None -> 0.0"),
    ):  # fmt: skip
        with pytest.raises(TutelageError, match=told):
            kept_record(tmp_path, "task-oriented", 10, 0, {**made, **other})


def test_records_of_another_method_do_not_count():
    """A published record that was made before there was a committee is not taken for a run that has one: the difference is named."""
    folder = PUBLISHED / "compare" / "fashion"
    made = json.loads((folder / "task-oriented-budget-10-seed-0.json").read_text())["settings"]
    assert "committee" not in made
    with pytest.raises(TutelageError, match="committee: None -> auto"):
        kept_record(folder, "task-oriented", 10, 0, {**made, "task": "classification", "committee": "auto"})
