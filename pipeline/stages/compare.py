"""Put all evaluations side by side: one table, and one report that opens from disk.

python -m pipeline.stages.compare --show data/compare/results       # the table once more, and where to look next
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.errors import UserError
from pipeline.harness import stage
from pipeline.report import comparison, series
from pipeline.report.entries import against, data_of, read_entry, with_agreement
from pipeline.report.evaluation import not_a_baseline
from pipeline.report.page import MLFLOW, gallery_of, gaps_of, leaks_of, render
from pipeline.report.sentences import told
from pipeline.report.table import as_csv, as_markdown, footnotes, pairs_as_csv, print_table
from pipeline.store import artifact
from pipeline.store.params import Names, Section


class Compare(Section):
    """The table and the report."""

    title: str | None = None
    """The report's title; null: the name of the data."""
    licence: str | None = None
    """What the images may be used for, in your words: it stands in the report's data card. Null: not said, but of images that
    winnow drew."""
    margin: float = Field(0.01, ge=0, lt=1)
    """Two entries that the test does not separate are equivalent if they differ by less, for certain; 0.01 is one point."""
    baseline: Annotated[str, Names("evaluate")]
    """The entry of `evaluate` that the others are compared with: one whose role is `baseline`."""


def run(params: Compare, *, evaluations: Path, out: Path, entries: tuple[str, ...]) -> stage.Metrics:
    """Write table.csv, pairs.csv, table.md, comparison.json and report.html from the artifacts of `evaluate`, and what DVC plots.

    The metrics are the ten figures of `series.summary`, the only ones that `dvc metrics show` and `dvc exp show` show.
    Their order is that of `entries`. Other folders in `evaluations`, left by entries that params.yaml no longer
    has, are not looked at.
    Raises UserError if the baseline has another role, or an entry is missing or was measured on other images than the baseline.
    """
    if params.baseline not in entries:
        raise UserError(f"`compare.baseline` is {params.baseline!r}, but `evaluate` has the entries {', '.join(entries)}.")
    read = [read_entry(name, artifact.verify(evaluations / name)) for name in entries]
    if wrong := not_a_baseline(params.baseline, {e.name: e.evaluation.role for e in read}):
        raise UserError(wrong)
    compared = with_agreement(against(params.baseline, read))
    notes = footnotes(compared)
    data = data_of(compared)
    title = params.title or f"SSLD on {data.name}"
    whole = comparison.of_entries(title, params.baseline, compared, params.margin)
    with artifact.writing(out) as tmp:
        (tmp / "table.csv").write_text(as_csv(compared, whole))
        (tmp / "pairs.csv").write_text(pairs_as_csv(whole))
        (tmp / "table.md").write_text(as_markdown(compared, notes))
        comparison.write(tmp, whole)
        series.write(tmp / series.FOLDER, whole)
        (tmp / "report.html").write_text(render(whole, compared, notes, evaluations.parent, out, params.licence or data.licence))
    print_table(title, compared, told(whole))
    _say_warnings(evaluations.parent)
    return series.summary(whole)


def show(out: Path) -> None:
    """Print the table of the artifact `out`, and where to look next. Raises UserError if there is none."""
    saved = comparison.read(out)
    print_table(saved.title, comparison.entries_of(saved), told(saved))
    _say_warnings(out.parents[1])
    gallery = gallery_of(out.parents[1])
    stages = out.with_name("stages.html")
    sys.stderr.write(f"\nreport   {out / 'report.html'}\n")
    sys.stderr.write(f"stages   {stages}: what ran, how long it took, and what DVC had already\n" if stages.exists() else "")
    sys.stderr.write(f"gallery  {gallery}: what the leak check found, and where to decide about it\n" if gallery.exists() else "")
    sys.stderr.write(f"runs     {MLFLOW}\n")


def _say_warnings(data: Path) -> None:
    for sentence in gaps_of(data):
        sys.stderr.write(f"GAP: {sentence}\n")
    for sentence in leaks_of(data):
        sys.stderr.write(f"LEAK: {sentence}\n")


def main() -> None:
    if sys.argv[1:2] != ["--show"]:
        stage.main(run, gathers="evaluate")
        return
    try:
        show(Path(sys.argv[2] if len(sys.argv) > 2 else "data/compare/results"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
