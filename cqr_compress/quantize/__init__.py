"""Methods: each has layouts that fit a budget, and fits a layout to a table's rows."""
