"""Pages of reports: self-contained HTML with charts, from the JSON of a report."""
