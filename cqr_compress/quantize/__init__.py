"""Methods: each lists the layouts that a budget allows, and fits a layout to the rows of a table."""
