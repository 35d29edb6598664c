"""docs/results.md and its plots are those of the rows beside it: nobody edits a published number."""

from pathlib import Path

import pytest

from zoo.evaluate import report
from zoo.evaluate.plots import drawn_digest, plan

OUT = Path("docs/results")


@pytest.fixture(autouse=True)
def _here(monkeypatch, repository):
    monkeypatch.chdir(repository)


def test_the_page_is_generated():
    assert OUT.with_suffix(".md").read_text("utf-8") == report.render(report.all_rows(OUT), OUT), (
        "generate it again: zoo evaluate SUITE --out docs/results"
    )


def test_every_plot_shows_these_rows_and_no_other_is_there():
    planned = {plot.file: plot.digest for rows in report.all_rows(OUT).values() for plot in plan(rows)}
    assert {path.name: drawn_digest(path) for path in OUT.glob("*.png")} == planned


def test_every_published_number_says_how_it_came_about():
    wanted = {"fingerprint", "commit", "seed", "data", "hardware", "command"}
    for rows in report.all_rows(OUT).values():
        for row in rows:
            assert wanted <= row.keys(), row
            assert row["commit"], row
