"""One self-contained HTML page about an output, or about the difference of two checkpoints.

`regraft report` and `regraft diff --html` gather facts here (`written`, `differing`), draw charts as geometry
(`heat_map`, `chart`), and hand both to templates that escape everything. A page has no script, loads nothing, and is
the same bytes for the same inputs.
"""
