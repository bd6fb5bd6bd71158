"""Records of finished runs: those that are published can be read, and count as done for what they were made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutelage.errors import TutelageError
from tutelage.recipes.records import kept_record
from tutelage.reporting.cells import counts_in, read_record
from tutelage.reporting.charts import short
from tutelage.reporting.study_charts import NAME

PUBLISHED = Path(__file__).parents[1] / "docs" / "results"
RECORDS = sorted(PUBLISHED.rglob("*-budget-*-seed-*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_published_results_can_be_read(path):
    """Every published record of a study can be read by the study's page."""
    record = read_record(path)
    assert record is not None
    assert len(counts_in(record)) == record["test_images"]


def test_names_of_variants_stay_apart():
    """Names that are too long for a chart are cut in the middle, so that variants of one arm can be told apart."""
    cut = [short(f"agnostic-oriented:{label}", NAME) for label in ("contrastive", "cosine")]
    assert cut == ["agnostic…trastive", "agnostic…d:cosine"]


def test_records_of_the_first_day_still_count():
    """A record that was made before a setting existed counts as done with what every run did then, and not with anything else."""
    folder = PUBLISHED / "compare" / "fashion"
    made = json.loads((folder / "oriented-budget-10-seed-0.json").read_text())["settings"]
    now = {**made, "task": "classification", "decoder": "lraspp", "agnostic_features": "patches"}
    assert kept_record(folder, "oriented", 10, 0, now) is not None
    with pytest.raises(TutelageError, match="task: classification -> segmentation"):
        kept_record(folder, "oriented", 10, 0, {**now, "task": "segmentation"})
