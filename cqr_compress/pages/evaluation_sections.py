"""Sections of an evaluation: metrics of files, errors of their rows, and neighbours before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cqr_compress.pages.bars import draw_bands
from cqr_compress.pages.elements import Chart, Column, Section, Table
from cqr_compress.pages.size_sections import slug
from cqr_compress.pages.text import abbreviated, file_name, number, plural, size, times

Report = Mapping[str, Any]


def evaluation_sections(evaluation: Report, files: Sequence[Report], prefix: str = "") -> list[Section]:
    """Return the sections of an evaluation: metrics of the files, and errors by frequency."""
    found = []
    rows = [(file["file"], file["file_bytes"], file["metrics"]) for file in files]
    if evaluation["dense"] is not None:
        rows.insert(0, (evaluation["original"], evaluation["dense_bytes"], evaluation["dense"]))
    names = list(dict.fromkeys(name for _, _, metrics in rows for name in metrics or ()))
    if names or len(files) > 1:
        columns = [Column("file"), Column("bytes", True), Column("ratio", True)]
        columns += [Column(name, True) for name in names]
        dense_bytes = evaluation["dense_bytes"]
        cells = [
            [
                file_name(file), size(nbytes or 0),
                times(dense_bytes, nbytes) if dense_bytes and nbytes else "",
                *(number(metrics[name]) if name in (metrics or {}) else "" for name in names),
            ]
            for file, nbytes, metrics in rows
        ]  # fmt: skip
        task = f"Task: {evaluation['task']}." if evaluation["task"] else ""
        found.append(Section("Metrics", task, table=Table(columns, cells).filled()))
    if len(files) > 1 and any(file["tables"] for file in files):
        found.append(_quality_section(files))
    charts: list[Chart] = []
    for file in files:
        for table in file["tables"]:
            if table["bands"]:
                of_file = f"{file_name(file['file'])}: " if len(files) > 1 else ""
                name = f"{prefix}bands-{len(charts) + 1}-{slug(table['name'])}"
                charts.append(_bands_chart(name, f"{of_file}{table['name']}", table["bands"]))
    if charts:
        lead = "Errors of the rows of frequent ids, which most lookups read, and of rare ones."
        found.append(Section("By frequency of ids", lead, charts))
    return found


def _bands_chart(name: str, title: str, bands: Sequence[Report]) -> Chart:
    sizes = "; ".join(f"{band['name']}: {plural(band['num_ids'], 'id')}" for band in bands)
    return Chart(name, title, lambda width: draw_bands(bands, width), f"{sizes}.")


_QUALITY = {
    "relative_mse": "relative MSE", "weighted_relative_mse": "weighted MSE", "mean_cosine": "mean cosine",
    "recall_at_10": "recall@10",
}  # fmt: skip


def _quality_section(files: Sequence[Report]) -> Section:
    """Return the section that compares the rows of several files."""
    columns = [Column("file"), Column("table"), *(Column(title, True) for title in _QUALITY.values())]
    rows = [
        [
            file_name(file["file"]), table["name"],
            *(number(table["quality"][key]) if key in table["quality"] else "" for key in _QUALITY),
        ]
        for file in files
        for table in file["tables"]
    ]  # fmt: skip
    return Section("Rows compared with the original's", table=Table(columns, rows).filled())


def neighbours_section(found: Report) -> Section:
    """Return the section of the nearest rows of sampled ids before and after."""
    base, rows = found["base"], found["num_rows"]
    among = f"all {rows:,}" if base == rows else f"{base:,} of its {rows:,}"
    kept = [
        sum(item[0] in {i for i, *_ in query["before"]} for item in query["after"]) for query in found["queries"]
    ]
    k = max((len(query["before"]) for query in found["queries"]), default=0)
    share = f"{sum(kept)} of {k * len(kept)} neighbours are kept. " if kept else ""
    lead = f"{share}By cosine, among {among} rows of {found['table']}."
    queries = []
    for query, same in zip(found["queries"], kept, strict=True):
        sides = {}
        for side, other in (("before", "after"), ("after", "before")):
            ids = {item[0] for item in query[other]}
            sides[side] = [
                {"label": abbreviated(label), "cosine": f"{cosine:.3f}", "shared": i in ids}
                for i, label, cosine in query[side]
            ]
        queries.append({"label": abbreviated(query["label"]), "id": query["id"], "kept": same, "of": k, **sides})
    return Section("Nearest neighbours", lead, queries=queries)


def recorded_evaluation(report: Report, prefix: str = "") -> list[Section]:
    """Return the sections of the evaluation that a size report records."""
    evaluation = report.get("evaluation")
    return [] if evaluation is None else evaluation_sections(evaluation, [evaluation], prefix)
