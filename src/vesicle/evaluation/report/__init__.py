"""What an evaluation found: records, rows, tables, plots and pages."""
